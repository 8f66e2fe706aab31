"""SequenceLoader as a part of a training loop: order, ranks, resuming, errors, threads."""

from __future__ import annotations

import json
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from strategies import day, events_of_day, history_of, many_events, request_table

from vlm_dagster import Batch, JaggedSequence, PointerDataset, Projection, SequenceLoader, Trait
from vlm_dagster.errors import CorruptFileError, LoaderError, PinError, SchemaError

EVENTS = many_events(seed=4, num_events=700, num_users=30)
PROJECTION = {"ratings": Projection(["event_id"], max_length=20)}
# Small units and chunks, so that batches straddle both.
OPTIONS: dict[str, Any] = {
    "batch_size": 32, "examples_per_unit": 25, "mix": 3, "lanes": 4, "seed": 7,
}  # fmt: skip


@pytest.fixture(scope="module")
def pointers(tmp_path_factory: pytest.TempPathFactory) -> PointerDataset:
    return pointers_in(tmp_path_factory.mktemp("tables"))


def pointers_in(folder: Path) -> PointerDataset:
    store = history_of(folder / "history", EVENTS, num_buckets=3)
    dataset = PointerDataset.create(
        folder / "pointers", ["ratings"], [Trait("label", pa.float64())], num_buckets=3
    )
    for number in range(4):
        asked = events_of_day(EVENTS, number)
        table = request_table(asked, pa.int64(), ["user_id", "event_id"], pa.int64())
        labels = pa.array([float(i) for i in range(len(asked))], pa.float64())
        dataset.seal(
            day(number), table.append_column("label", labels), {"ratings": store.snapshot()}
        )
    return dataset


def loader_of(pointers: PointerDataset, **options: Any) -> SequenceLoader:
    return SequenceLoader(pointers.ref(), PROJECTION, **{**OPTIONS, **options})


def content(batch: Batch) -> tuple[object, ...]:
    sequence = batch.sequences["ratings"]
    return (
        tuple(batch.examples["user_id"].tolist()),
        tuple(batch.examples["request_id"].tolist()),
        tuple(sequence.offsets.tolist()),
        tuple(sequence.values["event_id"].tolist()),
    )


def ids(batches: list[tuple[Any, ...]]) -> list[tuple[int, int]]:
    return [pair for users, requests, *_ in batches for pair in zip(users, requests, strict=True)]


def test_an_epoch_has_every_example_once_in_full_batches(pointers: PointerDataset) -> None:
    loader = loader_of(pointers)
    num_batches = len(loader)
    batches = [content(batch) for batch in loader]
    assert len(batches) == num_batches == -(-loader.num_examples // 32)
    assert all(len(batch[0]) == 32 for batch in batches[:-1])
    found = ids(batches)
    assert len(set(found)) == len(found) == loader.num_examples == len(EVENTS)
    assert loader.epoch == 1


def test_epochs_and_seeds_differ_in_order_only(pointers: PointerDataset) -> None:
    loader = loader_of(pointers)
    first, second = ([content(b) for b in loader] for _ in range(2))
    assert first != second
    assert sorted(ids(first)) == sorted(ids(second))
    loader.set_epoch(0)
    assert [content(b) for b in loader] == first
    assert [content(b) for b in loader_of(pointers, seed=8)] != first


def test_an_epoch_under_way_keeps_its_order(pointers: PointerDataset) -> None:
    unbroken = [content(batch) for batch in loader_of(pointers)]
    loader = loader_of(pointers, num_workers=0, prefetch=0, mix=1)
    plain = [content(b) for b in loader_of(pointers, mix=1)]
    assert [content(batch) for batch in loader] == plain != unbroken


def test_resuming_at_any_batch_gives_the_batches_that_would_have_come(
    pointers: PointerDataset,
) -> None:
    loader = loader_of(pointers)
    unbroken = [content(batch) for _ in range(2) for batch in loader]
    per_epoch = len(unbroken) // 2
    stopping = loader_of(pointers)
    states = [stopping.state_dict()]
    for _ in range(2):
        # Through JSON, as a checkpoint would keep it; the prefetched batches are not in it.
        states += [json.loads(json.dumps(stopping.state_dict())) for _ in stopping]
    for done, state in enumerate(states[: per_epoch + 2]):
        resumed = loader_of(pointers, num_workers=done % 3, prefetch=done % 2)
        resumed.load_state_dict(state)
        rest = [content(b) for b in resumed]
        while len(rest) < min(len(unbroken) - done, per_epoch):
            rest += [content(b) for b in resumed]
        assert rest == unbroken[done : done + len(rest)]


def test_a_state_of_other_data_or_options_is_refused(
    pointers: PointerDataset, tmp_path: Path
) -> None:
    state = loader_of(pointers).state_dict()
    for other in ({"batch_size": 16}, {"seed": 1}, {"order": "stored"}, {"lanes": 2}):
        with pytest.raises(PinError, match="start anew"):
            loader_of(pointers, **other).load_state_dict(state)
    projected = SequenceLoader(pointers.ref(), {"ratings": Projection(["event_id"])}, **OPTIONS)
    with pytest.raises(PinError, match="start anew"):
        projected.load_state_dict(state)
    fewer = SequenceLoader(pointers.ref([day(0)]), PROJECTION, **OPTIONS)
    with pytest.raises(PinError, match="start anew"):
        fewer.load_state_dict(state)
    with pytest.raises(PinError, match="another release"):
        loader_of(pointers).load_state_dict({**state, "version": 99})


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_keep_drop_repeat_or_pad_their_surplus(
    pointers: PointerDataset, world_size: int
) -> None:
    def ranks(uneven: str) -> list[list[Batch]]:
        return [
            list(loader_of(pointers, rank=r, world_size=world_size, uneven=uneven))
            for r in range(world_size)
        ]

    kept, dropped, repeated, padded = (ranks(u) for u in ("keep", "drop", "repeat", "pad"))
    everything = sorted(pair for rank in kept for pair in ids([content(b) for b in rank]))
    assert everything == sorted({(e["user_id"], e["event_id"]) for e in EVENTS})
    counts = [len(rank) for rank in kept]
    assert max(counts) - min(counts) <= 1
    assert {len(rank) for rank in dropped} == {len(EVENTS) // 32 // world_size}
    assert {len(rank) for rank in repeated} == {len(rank) for rank in padded} == {max(counts)}
    for rank in (*dropped, *repeated, *padded):
        assert {batch.batch_size for batch in rank} == {32}
    for full, short, longer, filled in zip(kept, dropped, repeated, padded, strict=True):
        found = [content(b) for b in full if b.batch_size == 32]
        assert [content(b) for b in short] == found[: len(short)]
        assert [content(b) for b in longer[: len(found)]] == found
        assert [content(b) for b in filled[: len(found)]] == found
    rest = [
        pair for rank in padded for b in rank for pair in ids([content(b)])[: 32 - b.num_padding]
    ]
    assert sorted(rest) == everything


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_workers_and_prefetching_change_nothing(
    pointers: PointerDataset, num_workers: int, prefetch: int
) -> None:
    plain = [content(b) for b in loader_of(pointers, num_workers=0, prefetch=0)]
    found = [content(b) for b in loader_of(pointers, num_workers=num_workers, prefetch=prefetch)]
    assert found == plain


def threads() -> set[int | None]:
    return {thread.ident for thread in threading.enumerate()}


def assert_no_thread_is_left(before: set[int | None]) -> None:
    deadline = time.monotonic() + 10
    while threads() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not threads() - before


def test_stopping_early_leaves_no_threads(pointers: PointerDataset) -> None:
    before = threads()
    for _ in loader_of(pointers):
        break
    assert_no_thread_is_left(before)

    def failing() -> Iterator[None]:
        for _ in loader_of(pointers):
            raise KeyError("a training step failed")
        yield

    with pytest.raises(KeyError):
        next(failing())
    assert_no_thread_is_left(before)
    assert len([*loader_of(pointers)]) > 1
    assert_no_thread_is_left(before)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_comes_out_as_it_was_raised(tmp_path: Path, num_workers: int) -> None:
    pointers = pointers_in(tmp_path)
    loader = loader_of(pointers, num_workers=num_workers)
    lost = sorted((tmp_path / "history").glob("segment=*/bucket=*/*.parquet"))[0]
    lost.unlink()
    before = threads()
    with pytest.raises(CorruptFileError, match="is missing") as raised:
        list(loader)
    assert raised.value.path.endswith(lost.name)
    assert_no_thread_is_left(before)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": True}, "batch_size=True"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"rank": 0}, "world_size=None"),
        ({"mix": -1}, "mix=-1"),
        ({"balance": "tokens", "max_tokens": 9}, "max_tokens=9"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"uneven": "fill"}, "uneven='fill'"),
        ({"verify": True}, "verify=True"),
        ({"events_per_pool": 0}, "events_per_pool=0"),
    ],
)
def test_options_are_checked(pointers: PointerDataset, options: dict, told: str) -> None:
    with pytest.raises(SchemaError, match=told):
        loader_of(pointers, **options)


def test_unknown_groups_and_traits_are_refused(pointers: PointerDataset) -> None:
    with pytest.raises(SchemaError, match="no pointers into 'views'"):
        SequenceLoader(pointers.ref(), {"views": Projection()})
    with pytest.raises(SchemaError, match="no trait 'price'"):
        SequenceLoader(pointers.ref(), {"ratings": Projection(["price"])})


def test_a_batch_moves_and_pads() -> None:
    sequence = JaggedSequence.expanded(
        {"item": torch.tensor([1, 2, 3, 4, 5, 6])}, torch.tensor([0, 3, 3, 6])
    )
    batch = Batch({"request_time": torch.arange(3)}, {"ratings": sequence}, {"name": ["a"] * 3})
    moved = batch.to("cpu")
    assert moved.batch_size == 3
    assert moved.strings == batch.strings
    assert sequence.to_padded("item", 2).tolist() == [[2, 3], [0, 0], [5, 6]]
    assert sequence.to_padded("item", 4, value=-1).tolist() == [
        [1, 2, 3, -1], [-1, -1, -1, -1], [4, 5, 6, -1],
    ]  # fmt: skip
    assert sequence.to_padded("item", 4, value=-1, side="left").tolist() == [
        [-1, 1, 2, 3], [-1, -1, -1, -1], [-1, 4, 5, 6],
    ]  # fmt: skip
    assert sequence.to_padded("item").shape == (3, 3)
    with pytest.raises(SchemaError, match="side="):
        sequence.to_padded("item", 2, side="middle")  # type: ignore[arg-type]


def test_only_the_newest_pass_goes_on(pointers: PointerDataset) -> None:
    whole = [content(batch) for batch in loader_of(pointers)]
    loader = loader_of(pointers)
    older = iter(loader)
    assert content(next(older)) == whole[0]
    newer = iter(loader)
    assert content(next(newer)) == whole[1]
    with pytest.raises(LoaderError, match="another pass has begun"):
        next(older)
    loader.set_epoch(5)
    with pytest.raises(LoaderError, match="set to another place"):
        next(newer)
    assert (loader.state_dict()["epoch"], loader.state_dict()["num_batches"]) == (5, 0)


def test_a_batch_is_not_kept_while_the_next_one_is_formed(pointers: PointerDataset) -> None:
    alive: list[weakref.ref[Batch]] = []
    for batch in loader_of(pointers, num_workers=0, prefetch=0):
        assert not any(ref() is not None for ref in alive)
        alive.append(weakref.ref(batch))
        del batch
    assert len(alive) > 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"histories": {"rating": "elsewhere"}}, "'rating', which is not read"),
        ({"device": "gpu"}, "device='gpu'"),
        ({"cache_bytes": -1}, "cache_bytes=-1"),
        ({"balance_length": 10**30, "balance": "flops"}, "balance_length"),
        ({"workers": "fork"}, "workers='fork'"),
    ],
)
def test_what_fits_nothing_is_refused_at_once(
    pointers: PointerDataset, options: dict, told: str
) -> None:
    with pytest.raises(SchemaError, match=told):
        loader_of(pointers, **options)


def test_what_is_no_pin_and_no_projection_is_refused(pointers: PointerDataset) -> None:
    with pytest.raises(SchemaError, match="pointers is a PointerDataset"):
        SequenceLoader(pointers, PROJECTION)  # type: ignore[arg-type]
    with pytest.raises(SchemaError, match="projection of 'ratings' is a list"):
        SequenceLoader(pointers.ref(), {"ratings": ["event_id"]})  # type: ignore[dict-item]
