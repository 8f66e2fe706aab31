"""The invariants seen from the end of the pipeline: what the loader hands to training."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import fat_rows
from strategies import (
    day,
    event_lists,
    events_of_day,
    few,
    history_of,
    many_events,
    request_lists,
    request_table,
    seal_days,
)

from vlm_dagster import HistoryStore, PointerDataset, PointerRef, Projection, SequenceLoader, Trait

TRAITS = ["event_id", "available_at", "item_id", "rating", "liked"]
EVENTS = many_events(seed=11, num_events=1_500, num_users=25)
Example = tuple[int, int, float, dict[str, list]]


def loaded(ref: PointerRef, projection: Projection, **options: object) -> list[Example]:
    """(user, request time, label, sequence by trait) of every example, in the loader's order."""
    found: list[Example] = []
    loader = SequenceLoader(ref, {"ratings": projection}, **options)  # type: ignore[arg-type]
    for batch in loader:
        sequence = batch.sequences["ratings"]
        for row in range(batch.batch_size):
            low, high = sequence.offsets[row], sequence.offsets[row + 1]
            found.append(
                (
                    int(batch.examples["user_id"][row]),
                    int(batch.examples["request_time"][row]),
                    float(batch.examples["label"][row]),
                    {name: values[low:high].tolist() for name, values in sequence.values.items()},
                )
            )
    return found


def expected(events: list[dict], requests: list[dict], projection: Projection) -> list[Example]:
    names = projection.traits or ()
    return [
        (
            row["user_id"],
            row["request_time"],
            float(row["label"]),
            {name: [event[name] for event in row["sequence"]] for name in names},
        )
        for row in fat_rows(events, requests, projection.max_length)
    ]


def labelled(requests: list[dict], names: list[str]) -> pa.Table:
    labels = pa.array([float(r["label"]) for r in requests], pa.float64())
    return request_table(requests, pa.int64(), names, pa.int64()).append_column("label", labels)


def pointers_to(
    uri: str | Path, store: HistoryStore, events: list[dict], num_buckets: int = 3
) -> PointerDataset:
    """Every event of days 1 to 3 is to be predicted; each day pins the first snapshot covering it."""
    dataset = PointerDataset.create(
        uri, ["ratings"], [Trait("label", pa.float64())], num_buckets=num_buckets
    )
    for number in (1, 2, 3):
        snapshot = store.snapshot(store.version_covering(day(number)))
        table = labelled(events_of_day(requests_of(events), number), ["user_id", "event_id"])
        dataset.seal(day(number), table, {"ratings": snapshot})
    return dataset


def requests_of(events: list[dict]) -> list[dict]:
    return [{**event, "label": number} for number, event in enumerate(events)]


def asked_of(events: list[dict]) -> list[dict]:
    keys = ("user_id", "event_id", "label")
    asked = [r for n in (1, 2, 3) for r in events_of_day(requests_of(events), n)]
    return [{key: request[key] for key in keys} for request in asked]


def by_label(examples: list[Example]) -> list[Example]:
    return sorted(examples, key=lambda example: example[2])


@few(8)
@given(event_lists(), st.data(), st.sampled_from([None, 1, 3]), st.sampled_from([1, 2, 3]))
def test_every_example_has_the_references_sequence(
    events: list[dict], data: st.DataObject, max_length: int | None, num_buckets: int
) -> None:
    requests = [{**r, "label": r["request_id"]} for r in data.draw(request_lists(events))]
    projection = Projection(TRAITS, max_length)
    with TemporaryDirectory() as folder:
        store = history_of(f"{folder}/history", events)
        dataset = PointerDataset.create(
            f"{folder}/pointers",
            ["ratings"],
            [Trait("label", pa.float64())],
            request="request_time",
            num_buckets=num_buckets,
        )
        for number in range(4):
            asked = [{**r, "available_at": r["request_time"]} for r in requests]
            table = labelled(
                events_of_day(asked, number), ["user_id", "request_id", "request_time"]
            )
            dataset.seal(day(number), table, {"ratings": store.snapshot()})
        found = loaded(dataset.ref(), projection, batch_size=3)
        assert by_label(found) == by_label(expected(events, requests, projection))


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[HistoryStore, PointerDataset]:
    folder = tmp_path_factory.mktemp("tables")
    store = history_of(folder / "history", EVENTS, num_buckets=4)
    return store, pointers_to(folder / "pointers", store, EVENTS)


@pytest.mark.parametrize("max_length", [None, 1, 50])
def test_many_examples_have_the_references_sequences(
    tables: tuple[HistoryStore, PointerDataset], max_length: int | None
) -> None:
    projection = Projection(TRAITS, max_length)
    found = loaded(tables[1].ref(), projection, batch_size=64)
    assert by_label(found) == by_label(expected(EVENTS, asked_of(EVENTS), projection))


def test_no_example_sees_its_own_event_or_a_later_one(
    tables: tuple[HistoryStore, PointerDataset],
) -> None:
    for _, time, label, sequence in loaded(tables[1].ref(), Projection(TRAITS)):
        assert all(available_at < time for available_at in sequence["available_at"])
        assert EVENTS[int(label)]["event_id"] not in sequence["event_id"]


@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 0},
        {"num_workers": 4, "prefetch": 7},
        {"examples_per_unit": 5},
        {"events_per_unit": 50},
        {"batch_size": 7},
        {"order": "stored"},
        {"order": "time"},
        {"mix": 0},
        {"mix": 1, "lanes": 3},
        {"max_tokens": 100},
        {"balance": "tokens"},
        {"balance": "flops"},
        {"seed": 9},
        {"verify": "off"},
    ],
    ids=str,
)
def test_the_way_of_loading_changes_no_sequence(
    tables: tuple[HistoryStore, PointerDataset], options: dict
) -> None:
    plain = loaded(tables[1].ref(), Projection(TRAITS, 20))
    assert by_label(loaded(tables[1].ref(), Projection(TRAITS, 20), **options)) == by_label(plain)


def test_the_same_seed_gives_the_same_batches_with_any_number_of_workers(
    tables: tuple[HistoryStore, PointerDataset],
) -> None:
    runs = [
        loaded(tables[1].ref(), Projection(TRAITS, 20), seed=3, num_workers=n) for n in (0, 1, 4)
    ]
    assert runs[0] == runs[1] == runs[2]
    assert loaded(tables[1].ref(), Projection(TRAITS, 20), seed=4) != runs[0]


def test_ranks_share_the_examples_out(tables: tuple[HistoryStore, PointerDataset]) -> None:
    whole = loaded(tables[1].ref(), Projection(TRAITS, 5))
    shares = [
        loaded(
            tables[1].ref(), Projection(TRAITS, 5), rank=rank, world_size=3, examples_per_unit=20
        )
        for rank in range(3)
    ]
    assert by_label([example for share in shares for example in share]) == by_label(whole)


def test_a_pin_loads_the_same_after_later_commits(tmp_path: Path) -> None:
    store = history_of(tmp_path / "history", EVENTS, num_buckets=2)
    dataset = pointers_to(tmp_path / "pointers", store, EVENTS)
    ref = dataset.ref()
    before = loaded(ref, Projection(TRAITS))
    seal_days(store, EVENTS, [4, 5])
    dataset.seal(day(4), [], {"ratings": store.snapshot()})
    assert loaded(PointerRef.from_json(ref.to_json()), Projection(TRAITS)) == before


@pytest.mark.parametrize("names", [["item_id"], ["rating", "event_id"], []])
@pytest.mark.parametrize("max_length", [0, 1, 7])
def test_a_projection_is_a_slice_of_the_whole(
    tables: tuple[HistoryStore, PointerDataset], names: list[str], max_length: int
) -> None:
    whole = loaded(tables[1].ref(), Projection(TRAITS))
    part = loaded(tables[1].ref(), Projection(names, max_length))
    assert part == [
        (
            user,
            time,
            label,
            {n: sequence[n][max(len(sequence[n]) - max_length, 0) :] for n in names},
        )
        for user, time, label, sequence in whole
    ]


def test_a_history_that_is_not_the_pinned_one_is_noticed(tmp_path: Path) -> None:
    from vlm_dagster.errors import VlmError

    store = history_of(tmp_path / "history", EVENTS, num_buckets=2)
    dataset = pointers_to(tmp_path / "pointers", store, EVENTS)
    fewer = [event for event in EVENTS if event["event_id"] % 7]
    other = history_of(tmp_path / "other", fewer, num_buckets=2)
    with pytest.raises(VlmError):
        loaded(dataset.ref(), Projection(TRAITS), histories={"ratings": other.uri})


def test_tensors_have_the_traits_types(tables: tuple[HistoryStore, PointerDataset]) -> None:
    loader = SequenceLoader(tables[1].ref(), {"ratings": Projection(TRAITS)}, batch_size=10)
    values = next(iter(loader)).sequences["ratings"].values
    kinds = {name: tensor.dtype for name, tensor in values.items()}
    assert kinds == {
        "event_id": torch.int64,
        "available_at": torch.int64,
        "item_id": torch.int64,
        "rating": torch.float32,
        "liked": torch.bool,
    }


def test_changing_a_batch_in_place_changes_no_other(
    tables: tuple[HistoryStore, PointerDataset],
) -> None:
    _, pointers = tables
    for batch_size in (1, 7):
        untouched = loaded(pointers.ref(), Projection(TRAITS), batch_size=batch_size, seed=2)
        found: list[Example] = []
        loader = SequenceLoader(
            pointers.ref(), {"ratings": Projection(TRAITS)}, batch_size=batch_size, seed=2
        )
        for batch in loader:
            sequence = batch.sequences["ratings"]
            for row in range(batch.batch_size):
                low, high = sequence.offsets[row], sequence.offsets[row + 1]
                values = {n: v[low:high].tolist() for n, v in sequence.values.items()}
                found.append(
                    (
                        int(batch.examples["user_id"][row]),
                        int(batch.examples["request_time"][row]),
                        float(batch.examples["label"][row]),
                        values,
                    )
                )
            for tensor in (*sequence.values.values(), *batch.examples.values()):
                tensor.zero_()
        assert found == untouched
