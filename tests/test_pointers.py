"""Pointer datasets: what a request becomes, what is refused, and what is pinned."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path

import pyarrow as pa
import pytest
from reference import checksum, fat_rows, histories
from strategies import (
    TIME,
    at,
    day,
    events_of_day,
    files_below,
    group_of,
    history_of,
    many_events,
    request_table,
    seal_days,
)

from vlm_dagster import HistoryStore, PointerDataset, PointerRef, Trait
from vlm_dagster.errors import (
    InvalidRequestsError,
    PinError,
    SchemaError,
    TableError,
    WatermarkError,
    WindowError,
    WindowSealedError,
)

EVENTS = many_events(seed=0, num_events=600, num_users=12)


@pytest.fixture
def store(tmp_path: Path) -> HistoryStore:
    return history_of(tmp_path / "history", EVENTS, num_buckets=4)


def ids_of(events: list[dict], kind: pa.DataType = pa.int64()) -> pa.Table:  # noqa: B008
    return request_table(events, kind, ["user_id", "event_id"], kind)


def timed(requests: list[tuple[int, int, int]]) -> pa.Table:
    """Requests of (user, id, time)."""
    users, ids, times = zip(*requests, strict=True) if requests else ((), (), ())
    return pa.table(
        {
            "user_id": pa.array(users, pa.int64()),
            "request_id": pa.array(ids, pa.int64()),
            "request_time": pa.array(times, TIME),
        }
    )


def stored(dataset: PointerDataset) -> dict[object, dict]:
    """Request id -> example, its times as integers."""
    table = dataset.snapshot().to_table()
    for i, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type):
            table = table.set_column(i, field.name, table.column(i).cast(pa.int64()))
    return {row["request_id"]: row for row in table.to_pylist()}


def check_pointer(example: dict, row: dict, group: str = "ratings") -> None:
    """A stored pointer is what the reference says it is, part by part."""
    sequence, end = row["sequence"], row["end_position"]
    assert example["request_time"] == row["request_time"]
    assert example[f"{group}_end_position"] == end
    assert example[f"{group}_length"] == len(sequence)
    ids = [event["event_id"] for event in sequence]
    assert example[f"{group}_checksum"] == checksum(ids, end - len(sequence))
    times = [event["available_at"] for event in sequence] or [row["request_time"]]
    assert example[f"{group}_start_time"] == times[0]
    assert example[f"{group}_end_time"] == times[-1]


def refused(
    dataset: PointerDataset,
    rows: object,
    histories: dict,
    error: type[Exception],
    *words: str,
    key: str = day(1),
) -> Exception:
    before, version = files_below(dataset.uri), dataset.state().version
    with pytest.raises(error) as caught:
        dataset.seal(key, rows, histories)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert files_below(dataset.uri) == before
    assert dataset.state().version == version
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    return caught.value


# -- what a request becomes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_length", "num_buckets"), [(None, 4), (1, 1), (7, 3), (7, 8), (10_000, 4)]
)
def test_events_to_predict_become_the_references_pointers(
    store: HistoryStore, tmp_path: Path, max_length: int | None, num_buckets: int
) -> None:
    dataset = PointerDataset.create(
        tmp_path / "pointers", ["ratings"], max_length=max_length, num_buckets=num_buckets
    )
    for number in (2, 1):
        sealed = dataset.seal(
            day(number), ids_of(events_of_day(EVENTS, number)), {"ratings": store.snapshot()}
        )
        assert sealed.num_events == len(events_of_day(EVENTS, number))
    found = stored(dataset)
    asked = [*events_of_day(EVENTS, 1), *events_of_day(EVENTS, 2)]
    rows = fat_rows(
        EVENTS, [{"user_id": e["user_id"], "event_id": e["event_id"]} for e in asked], max_length
    )
    assert len(found) == len(rows)
    for row in rows:
        check_pointer(found[row["event_id"]], row)


def test_examples_lie_sorted_by_user_and_time(store: HistoryStore, tmp_path: Path) -> None:
    dataset = PointerDataset.create(tmp_path / "pointers", ["ratings"], num_buckets=1)
    asked = events_of_day(EVENTS, 1)
    random.Random(0).shuffle(asked)
    dataset.seal(day(1), ids_of(asked), {"ratings": store.snapshot()})
    rows = dataset.snapshot().to_table(["user_id", "request_time", "request_id"]).to_pylist()
    assert rows == sorted(rows, key=lambda r: tuple(r.values()))


def test_labels_and_candidates_stay_with_their_request(store: HistoryStore, tmp_path: Path) -> None:
    dataset = PointerDataset.create(
        tmp_path / "pointers",
        ["ratings"],
        [Trait("label", pa.float32()), Trait("slot", pa.string(), missing="none")],
    )
    asked = events_of_day(EVENTS, 1)
    table = ids_of(asked).append_column(
        "label", pa.array([float(e["event_id"]) for e in asked], pa.float32())
    )
    slots = [None if e["event_id"] % 2 else str(e["event_id"]) for e in asked]
    dataset.seal(
        day(1), table.append_column("slot", pa.array(slots)), {"ratings": store.snapshot()}
    )
    for request_id, example in stored(dataset).items():
        assert example["label"] == float(request_id)
        assert example["slot"] == ("none" if request_id % 2 else str(request_id))


def test_several_groups_each_get_their_own_pointer(store: HistoryStore, tmp_path: Path) -> None:
    from vlm_dagster import FeatureGroup

    clicks = many_events(seed=8, num_events=300, num_users=20)
    group = FeatureGroup("clicks", group_of().traits, availability="recorded")
    other = history_of(tmp_path / "clicks", clicks, num_buckets=3, group=group)
    dataset = PointerDataset.create(
        tmp_path / "pointers", ["clicks", "ratings"], target_group="ratings", max_length=5
    )
    snapshots = {"ratings": store.snapshot(), "clicks": other.snapshot()}
    asked = events_of_day(EVENTS, 1)
    dataset.seal(day(1), ids_of(asked), snapshots)
    found = stored(dataset)
    times = {e["event_id"]: e["available_at"] for e in asked}
    requests = [
        {"user_id": e["user_id"], "event_id": e["event_id"], "request_time": times[e["event_id"]]}
        for e in asked
    ]
    for name, events in (("ratings", EVENTS), ("clicks", clicks)):
        for row in fat_rows(events, requests, 5):
            check_pointer(found[row["event_id"]], row, name)
    assert set(dataset.snapshot().pins_of(day(1))) == {"ratings", "clicks"}


def test_windows_of_pointers_and_histories_may_differ_in_length(tmp_path: Path) -> None:
    events = many_events(seed=5, num_events=400, num_users=6, num_days=8)
    store = history_of(tmp_path / "history", events, days=range(8))  # from a Saturday
    dataset = PointerDataset.create(
        tmp_path / "pointers", ["ratings"], windows="weekly", request="request_time"
    )
    sunday = at(1)
    requests = [
        (e["user_id"], e["event_id"], e["available_at"])
        for e in events
        if e["available_at"] >= sunday
    ]
    dataset.seal("1997-09-21", timed(requests), {"ratings": store.snapshot()})
    found = stored(dataset)
    assert len(found) == len(requests)
    asked = [{"user_id": u, "event_id": i, "request_time": t} for u, i, t in requests]
    for row in fat_rows(events, asked):
        check_pointer(found[row["event_id"]], row)


def test_string_ids_work_alike(tmp_path: Path) -> None:
    events = [
        {**e, "user_id": f"ü{e['user_id']}", "event_id": f"{e['event_id']:04d}/\x00"}
        for e in EVENTS
    ]
    store = history_of(tmp_path / "history", events, num_buckets=3)
    dataset = PointerDataset.create(
        tmp_path / "pointers",
        ["ratings"],
        user_id=pa.string(),
        request_id=pa.string(),
        max_length=9,
    )
    asked = events_of_day(events, 2)
    dataset.seal(day(2), ids_of(asked, pa.string()), {"ratings": store.snapshot()})
    found = stored(dataset)
    rows = fat_rows(
        events, [{"user_id": e["user_id"], "event_id": e["event_id"]} for e in asked], 9
    )
    for row in rows:
        check_pointer(found[row["event_id"]], row)


def test_a_request_at_an_events_own_instant_does_not_see_it(tmp_path: Path) -> None:
    event = {**EVENTS[0], "user_id": 1}
    events = [
        {**event, "event_id": n, "available_at": at(0, t), "event_time": 0}
        for n, t in enumerate([0, 5, 5, 5, 9])
    ]
    store = history_of(tmp_path / "history", events)
    dataset = PointerDataset.create(tmp_path / "pointers", ["ratings"], request="request_time")
    instants = [0, 1, 5, 6, 9, 10]
    dataset.seal(day(0), timed([(1, t, at(0, t)) for t in instants]), {"ratings": store.snapshot()})
    ends = {t: stored(dataset)[t]["ratings_end_position"] for t in instants}
    assert ends == {0: 0, 1: 1, 5: 1, 6: 4, 9: 4, 10: 5}


def test_unknown_users_have_empty_histories_and_are_counted(
    store: HistoryStore, tmp_path: Path
) -> None:
    dataset = PointerDataset.create(tmp_path / "pointers", ["ratings"], request="request_time")
    known = next(iter(sorted(histories(EVENTS))))
    first = histories(EVENTS)[known][0]["available_at"]
    requests = [
        (known, 1, first),
        (10**6, 2, at(0, 5)),
        (10**6 + 1, 3, at(0, 7)),
        (known, 4, at(1) - 1),
    ]
    staged = dataset.stage(day(0), timed(requests), {"ratings": store.snapshot()})
    assert staged.facts["num_unknown"] == 2
    assert staged.facts["num_empty"] == 3
    dataset.commit(staged)
    example = stored(dataset)[2]
    assert (example["ratings_length"], example["ratings_checksum"]) == (0, 0)
    assert example["ratings_start_time"] == example["ratings_end_time"] == at(0, 5)
    assert stored(dataset)[4]["ratings_length"] == len(
        [e for e in histories(EVENTS)[known] if e["available_at"] < at(1) - 1]
    )


@pytest.mark.parametrize("request_kind", ["event_id", "request_time"])
def test_a_window_without_requests_is_sealed_as_empty(
    store: HistoryStore, tmp_path: Path, request_kind: str
) -> None:
    dataset = PointerDataset.create(tmp_path / "pointers", ["ratings"], request=request_kind)
    nothing = ids_of([]) if request_kind == "event_id" else timed([])
    assert dataset.seal(day(1), nothing, {"ratings": store.snapshot()}).num_events == 0
    assert dataset.seal(day(2), [], {"ratings": store.snapshot()}).num_events == 0
    assert dataset.snapshot().to_table().num_rows == 0
    assert dataset.ref().open().num_examples == 0


# -- what is refused ------------------------------------------------------------------------------


def test_a_request_beyond_the_watermark_is_refused(tmp_path: Path) -> None:
    store = history_of(tmp_path / "history", EVENTS, days=[0, 2])
    by_time = PointerDataset.create(tmp_path / "by_time", ["ratings"], request="request_time")
    snapshots = {"ratings": store.snapshot()}
    refused(
        by_time, timed([(1, 1, at(1, 5))]), snapshots, WatermarkError, "watermark", day(1), "Seal"
    )
    by_event = PointerDataset.create(tmp_path / "by_event", ["ratings"])
    refused(
        by_event, ids_of(events_of_day(EVENTS, 1)), snapshots, WatermarkError, f"window {day(1)}"
    )
    # Exactly at the watermark the history is complete.
    assert by_time.seal(day(1), timed([(1, 1, at(1))]), snapshots).num_events == 1


def test_an_event_that_is_not_there_is_refused(store: HistoryStore, tmp_path: Path) -> None:
    dataset = PointerDataset.create(tmp_path / "pointers", ["ratings"])
    snapshots = {"ratings": store.snapshot()}
    asked = events_of_day(EVENTS, 1)
    unknown = {**asked[0], "event_id": 10**6}
    error = refused(
        dataset, ids_of([*asked, unknown]), snapshots, InvalidRequestsError,
        f"row {len(asked)}", f"user {unknown['user_id']}", "'event_id'", "1000000", "request_time",
    )  # fmt: skip
    assert error.row == len(asked)
    other_user = {**asked[0], "user_id": 10**6}
    refused(
        dataset, ids_of([other_user]), snapshots, InvalidRequestsError, "row 0", "no such event"
    )
    other_day = events_of_day(EVENTS, 2)[0]
    refused(dataset, ids_of([other_day]), snapshots, InvalidRequestsError, "row 0", day(1))


def test_a_request_outside_its_window_is_refused(store: HistoryStore, tmp_path: Path) -> None:
    dataset = PointerDataset.create(tmp_path / "pointers", ["ratings"], request="request_time")
    snapshots = {"ratings": store.snapshot()}
    rows = timed([(1, 1, at(1, 5)), (1, 2, at(2))])
    refused(
        dataset, rows, snapshots, InvalidRequestsError, "row 1", "request_time", f"window {day(2)}"
    )
    for far in (10**18, -1):
        refused(dataset, timed([(1, 1, far)]), snapshots, InvalidRequestsError, "check its unit")


@pytest.mark.parametrize("column", ["user_id", "request_id", "request_time"])
def test_a_request_without_an_id_or_a_time_is_refused(
    store: HistoryStore, tmp_path: Path, column: str
) -> None:
    dataset = PointerDataset.create(tmp_path / "pointers", ["ratings"], request="request_time")
    rows = timed([(1, 1, at(1)), (1, 2, at(1))])
    at_column = rows.column_names.index(column)
    first = rows[column][:1].combine_chunks()
    nulled = rows.set_column(at_column, column, pa.concat_arrays([first, pa.nulls(1, first.type)]))
    snapshots = {"ratings": store.snapshot()}
    refused(
        dataset, nulled, snapshots, InvalidRequestsError, "request row 1", repr(column), "is null"
    )
    refused(dataset, rows.drop_columns([column]), snapshots, SchemaError, repr(column), "missing")


def test_a_label_that_was_not_declared_is_refused(store: HistoryStore, tmp_path: Path) -> None:
    dataset = PointerDataset.create(tmp_path / "pointers", ["ratings"])
    table = ids_of(events_of_day(EVENTS, 1)[:1]).append_column("label", pa.array([1.0]))
    refused(dataset, table, {"ratings": store.snapshot()}, SchemaError, "'label'", "not declared")


def test_repeated_requests_follow_the_declared_policy(store: HistoryStore, tmp_path: Path) -> None:
    snapshots = {"ratings": store.snapshot()}
    asked = events_of_day(EVENTS, 1)
    twice = ids_of([*asked, *asked[:3]])
    strict = PointerDataset.create(tmp_path / "strict", ["ratings"])
    refused(strict, twice, snapshots, InvalidRequestsError, "a second time", "duplicates='first'")
    lax = PointerDataset.create(tmp_path / "lax", ["ratings"], duplicates="first")
    sealed = lax.seal(day(1), twice, snapshots)
    assert (sealed.num_events, sealed.num_duplicates) == (len(asked), 3)


def test_each_group_needs_its_own_history(store: HistoryStore, tmp_path: Path) -> None:
    rows = timed([])
    dataset = PointerDataset.create(tmp_path / "pointers", ["ratings"], request="request_time")
    snapshot = store.snapshot()
    refused(dataset, rows, {}, SchemaError, "ratings", "one snapshot of each")
    refused(dataset, rows, {"ratings": snapshot, "x": snapshot}, SchemaError, "'x'")
    other = PointerDataset.create(tmp_path / "other", ["clicks"], request="request_time")
    refused(other, rows, {"clicks": snapshot}, SchemaError, "'clicks'", "'ratings'")
    strings = PointerDataset.create(
        tmp_path / "strings", ["ratings"], request="request_time", user_id=pa.string()
    )
    refused(strings, rows, {"ratings": snapshot}, SchemaError, "user_id type")
    ids = PointerDataset.create(tmp_path / "ids", ["ratings"], request_id=pa.string())
    refused(ids, ids_of([]), {"ratings": snapshot}, SchemaError, "request_id type")


# -- sealing again --------------------------------------------------------------------------------


def test_sealing_again_with_a_later_snapshot_changes_nothing(tmp_path: Path) -> None:
    store = history_of(tmp_path / "history", EVENTS, days=[0, 1])
    early = store.snapshot()
    seal_days(store, EVENTS, [2, 3])
    dataset = PointerDataset.create(tmp_path / "pointers", ["ratings"])
    asked = ids_of(events_of_day(EVENTS, 1))
    first = dataset.seal(day(1), asked, {"ratings": early})
    for snapshot in (store.snapshot(), early, early.ref(), store.snapshot().ref()):
        again = dataset.seal(day(1), asked, {"ratings": snapshot})
        assert (again.reused, again.version, again.digest) == (True, first.version, first.digest)
    assert dataset.snapshot().pins_of(day(1)) == {"ratings": early.ref()}
    with pytest.raises(WindowSealedError):
        dataset.seal(day(1), asked.slice(1), {"ratings": early})


def test_sealing_again_with_an_earlier_snapshot_that_covers_it_changes_nothing(
    tmp_path: Path,
) -> None:
    store = history_of(tmp_path / "history", EVENTS)
    dataset = PointerDataset.create(tmp_path / "pointers", ["ratings"])
    asked = ids_of(events_of_day(EVENTS, 1))
    dataset.seal(day(1), asked, {"ratings": store.snapshot()})
    assert dataset.seal(day(1), asked, {"ratings": store.snapshot(version=2)}).reused


def test_sealing_again_with_another_history_is_refused(tmp_path: Path) -> None:
    store = history_of(tmp_path / "history", EVENTS)
    dataset = PointerDataset.create(tmp_path / "pointers", ["ratings"])
    asked = ids_of(events_of_day(EVENTS, 1))
    dataset.seal(day(1), asked, {"ratings": store.snapshot()})
    changed = [{**e, "item_id": e["item_id"] + 1} for e in EVENTS]
    for name, events in (("copy", EVENTS), ("changed", changed)):
        other = history_of(tmp_path / name, events)
        error = refused(
            dataset, asked, {"ratings": other.snapshot()}, PinError, day(1), "another history"
        )
        assert store.table_id in str(error)


def test_a_window_staged_for_another_dataset_is_refused(
    store: HistoryStore, tmp_path: Path
) -> None:
    first = PointerDataset.create(tmp_path / "first", ["ratings"])
    second = PointerDataset.create(tmp_path / "second", ["ratings"])
    staged = first.stage(day(1), ids_of([]), {"ratings": store.snapshot()})
    with pytest.raises(TableError, match="was staged for"):
        second.commit(staged)
    assert first.commit(pickle.loads(pickle.dumps(staged))).version == 1


# -- pins -----------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path: Path) -> PointerDataset:
    """Days 1 to 3, each pinned to the first snapshot that covers it."""
    store = history_of(tmp_path / "history", EVENTS)
    dataset = PointerDataset.create(tmp_path / "pointers", ["ratings"], num_buckets=2)
    for number in (1, 2, 3):
        snapshot = store.snapshot(store.version_covering(day(number)))
        dataset.seal(day(number), ids_of(events_of_day(EVENTS, number)), {"ratings": snapshot})
    return dataset


def test_every_window_names_the_snapshots_it_points_into(dataset: PointerDataset) -> None:
    snapshot = dataset.snapshot()
    assert [snapshot.pins_of(day(n))["ratings"].version for n in (1, 2, 3)] == [2, 3, 4]
    assert [pin.version for pin in snapshot.pins()["ratings"]] == [2, 3, 4]
    assert [pin.open().watermark_us for pin in dataset.ref().pins] == [at(2), at(3), at(4)]
    with pytest.raises(WindowError, match=day(0)):
        snapshot.pins_of(day(0))


def test_a_pin_survives_json_and_pickling(dataset: PointerDataset) -> None:
    for ref in (dataset.ref(), dataset.ref([day(2)]), dataset.ref(version=1)):
        assert PointerRef.from_json(json.loads(json.dumps(ref.to_json()))) == ref
        assert pickle.loads(pickle.dumps(ref)) == ref
        assert ref.open().ref() == ref
        assert hash(ref) == hash(pickle.loads(pickle.dumps(ref)))


def test_a_pin_of_some_windows_shows_only_these(dataset: PointerDataset) -> None:
    ref = dataset.ref([day(3), day(1)])
    assert ref.windows == (day(1), day(3))
    rows = ref.open().to_table().to_pylist()
    expected = {e["event_id"] for n in (1, 3) for e in events_of_day(EVENTS, n)}
    assert {row["request_id"] for row in rows} == expected
    assert ref.open().num_examples == len(rows) == len(expected)
    assert ref.digest != dataset.ref().digest


def test_a_window_that_is_not_sealed_cannot_be_pinned(dataset: PointerDataset) -> None:
    for ask in (
        lambda: dataset.ref([day(0)]),
        lambda: dataset.ref([day(3)], version=2),
    ):
        with pytest.raises(WindowError, match="not sealed"):
            ask()


def test_a_pin_whose_content_is_not_there_is_refused(dataset: PointerDataset) -> None:
    ref = dataset.ref()
    with pytest.raises(PinError, match="digest"):
        PointerRef.from_json({**ref.to_json(), "digest": "0" * 64}).open()
    with pytest.raises(PinError, match="table id"):
        PointerRef.from_json({**ref.to_json(), "table_id": "x"}).open()
    with pytest.raises(TableError, match="version 99"):
        PointerRef.from_json({**ref.to_json(), "version": 99}).open()


def test_a_pin_reads_the_same_after_other_windows(dataset: PointerDataset, tmp_path: Path) -> None:
    early = dataset.ref([day(1)], version=1)
    before = early.open().to_table()
    store = seal_days(HistoryStore.open(tmp_path / "history"), EVENTS, [4])
    for number in (4, 0):  # windows of examples may come in any order
        dataset.seal(day(number), [], {"ratings": store.snapshot()})
    assert early.open().to_table() == before
    assert dataset.ref().windows == tuple(day(n) for n in range(5))


def test_a_declared_start_is_kept(store: HistoryStore, tmp_path: Path) -> None:
    dataset = PointerDataset.create(tmp_path / "pointers", ["ratings"], start=day(2))
    refused(
        dataset, ids_of([]), {"ratings": store.snapshot()}, WindowError, f"first window {day(2)}"
    )


def test_the_index_of_users_finds_each_ones_examples(dataset: PointerDataset) -> None:
    snapshot = dataset.snapshot()
    by_user: dict[int, int] = {}
    for row in snapshot.to_table(["user_id"]).to_pylist():
        by_user[row["user_id"]] = by_user.get(row["user_id"], 0) + 1
    found: dict[int, int] = {}
    for bucket in range(snapshot.num_buckets):
        users = snapshot.users_of_bucket(bucket)
        counts = snapshot.bucket_index(bucket, users).num_events
        found.update(zip(users.to_pylist(), counts.tolist(), strict=True))
    assert found == by_user
