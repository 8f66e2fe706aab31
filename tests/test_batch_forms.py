"""Forming batches: every form of any ranges of any arenas shows what plain lists show."""

from __future__ import annotations

import gc
import random
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import fat_rows
from strategies import day, events_of_day, history_of, many_events, request_table

from vlm_dagster import JaggedSequence, PointerDataset, Projection, SequenceLoader
from vlm_dagster.history import ArenaBuffers
from vlm_dagster.loaders.forms import Piece, form_sequences
from vlm_dagster.loaders.materialize import Arena
from vlm_dagster.loaders.options import Form

TRAITS = {
    "item": pa.int64(),
    "liked": pa.bool_(),
    "kind": pa.int8(),
    "price": pa.float32(),
    "at": pa.timestamp("us", "UTC"),
}
TENSORS = {
    "item": torch.int64,
    "liked": torch.bool,
    "kind": torch.int8,
    "price": torch.float32,
    "at": torch.int64,
}


def arena_of(items: list[int], ranges: list[tuple[int, int]]) -> Arena:
    """An arena of these events, whose examples see these (start, length). Its columns are slices, as
    they may be: their first value is not their memory's first."""
    items = [-1, *items]
    columns = {
        "item": pa.array(items, pa.int64()),
        "liked": pa.array([item % 3 == 0 for item in items], pa.bool_()),
        "kind": pa.array([item % 100 for item in items], pa.int8()),
        "price": pa.array([item / 4 for item in items], pa.float32()),
        "at": pa.array(items, pa.int64()).cast(TRAITS["at"]),
    }
    starts, lengths = np.array(ranges, np.int64).reshape(-1, 2).T.copy()
    return Arena({name: column[1:] for name, column in columns.items()}, starts, lengths)


def piece(arena: Arena, rows: list[int]) -> Piece:
    return arena, np.array(rows, np.int64)


def formed(
    form: Form, pieces: list[Piece], buffers: ArenaBuffers | None = None, num_padding: int = 0
) -> JaggedSequence:
    buffers = buffers or ArenaBuffers()
    return form_sequences(form, pieces, list(TRAITS), buffers, num_padding=num_padding)


def seen(sequence: JaggedSequence, trait: str = "item") -> list[list[Any]]:
    """What each example sees, by the definition of starts and lengths."""
    values = sequence.values[trait].tolist()
    ranges = zip(sequence.starts.tolist(), sequence.lengths.tolist(), strict=True)
    return [values[start : start + length] for start, length in ranges]


def naive(pieces: list[Piece], trait: str = "item") -> list[list[Any]]:
    """The same from the arenas, in plain Python."""
    found = []
    for arena, rows in pieces:
        column = arena.columns[trait]
        values = (column.cast(pa.int64()) if trait == "at" else column).to_pylist()
        for row in rows.tolist():
            start, length = int(arena.starts[row]), int(arena.lengths[row])
            found.append(values[start : start + length])
    return found


every_form = pytest.mark.parametrize("form", get_args(Form))


# -- by example -----------------------------------------------------------------------------------

# Four events of one user and two of another. Examples 0 and 1 overlap, 2 lies within them, 3 adjoins
# nothing, 4 sees what 1 sees, 5 sees nothing.
ARENA = arena_of([10, 11, 12, 13, 20, 21], [(0, 3), (1, 3), (1, 2), (5, 1), (1, 3), (0, 0)])
ALL = [[10, 11, 12], [11, 12, 13], [11, 12], [21], [11, 12, 13], []]


def test_expanded_copies_every_examples_events() -> None:
    sequence = formed("expanded", [piece(ARENA, [0, 1, 2, 3, 4, 5])])
    assert seen(sequence) == ALL
    assert sequence.values["item"].tolist() == [10, 11, 12, 11, 12, 13, 11, 12, 21, 11, 12, 13]
    assert sequence.offsets.tolist() == [0, 3, 6, 8, 9, 12, 12]


def test_views_hold_every_event_once_and_none_that_nobody_sees() -> None:
    sequence = formed("views", [piece(ARENA, [0, 1, 2, 3, 4, 5])])
    assert seen(sequence) == ALL
    assert sequence.values["item"].tolist() == [10, 11, 12, 13, 21]
    assert sequence.dedupe_factor == 12 / 5


def test_deduplicated_holds_every_distinct_range_once() -> None:
    sequence = formed("deduplicated", [piece(ARENA, [0, 1, 2, 3, 4, 5])])
    assert seen(sequence) == ALL
    assert seen(sequence.unique) == [[], [10, 11, 12], [11, 12], [11, 12, 13], [21]]
    assert sequence.inverse.tolist() == [1, 3, 2, 4, 3, 0]


def test_equal_ranges_of_two_arenas_are_two() -> None:
    other = arena_of([10, 11, 12, 13], [(0, 4)])
    same = arena_of([10, 11, 12, 13], [(0, 4)])
    pieces = [piece(other, [0]), piece(same, [0]), piece(other, [0])]
    for form, held in [("expanded", 12), ("views", 8), ("deduplicated", 8)]:
        sequence = formed(form, pieces)  # type: ignore[arg-type]
        assert seen(sequence) == [[10, 11, 12, 13]] * 3
        assert sequence.num_values == held


def test_ranges_that_end_and_begin_an_arena_stay_apart() -> None:
    """They would be neighbours if arenas were laid out without a gap."""
    left, right = arena_of([1, 2], [(1, 1)]), arena_of([3, 4], [(0, 1)])
    assert seen(formed("views", [piece(left, [0]), piece(right, [0])])) == [[2], [3]]


# -- any ----------------------------------------------------------------------------------------


@st.composite
def pieces_of_any_arenas(draw: st.DrawFn) -> list[Piece]:
    arenas = []
    for number in range(draw(st.integers(1, 3))):
        size = draw(st.integers(0, 12))
        ranges = []
        for _ in range(draw(st.integers(0, 6))):
            start = draw(st.integers(0, size))
            ranges.append((start, draw(st.integers(0, size - start))))
        ranges = [(start if length else 0, length) for start, length in ranges]
        arenas.append(arena_of(list(range(100 * number, 100 * number + size)), ranges))
    pieces = []
    for arena in draw(st.lists(st.sampled_from(arenas), min_size=1, max_size=4)):
        num_examples = len(arena.starts)
        rows = st.integers(0, max(num_examples - 1, 0))
        pieces.append(piece(arena, draw(st.lists(rows, max_size=6 if num_examples else 0))))
    return pieces


@every_form
@given(pieces=pieces_of_any_arenas(), num_padding=st.integers(0, 2))
def test_any_ranges_form_like_lists(form: Form, pieces: list[Piece], num_padding: int) -> None:
    sequence = formed(form, pieces, num_padding=num_padding)
    assert sequence.form == form
    for trait, dtype in TENSORS.items():
        wanted = naive(pieces, trait) + [[]] * num_padding
        assert sequence.values[trait].dtype == dtype
        assert seen(sequence, trait) == wanted
        assert seen(sequence.expand(), trait) == wanted
    assert sequence.starts.dtype == sequence.lengths.dtype == torch.int64
    assert sequence.num_events == sum(map(len, naive(pieces)))
    assert sequence.longest == max(map(len, naive(pieces)), default=0)


@given(pieces=pieces_of_any_arenas())
def test_nothing_is_held_twice(pieces: list[Piece]) -> None:
    ranges = {
        (id(arena), int(arena.starts[row]), int(arena.lengths[row]))
        for arena, rows in pieces
        for row in rows.tolist()
    }
    events = {(arena, start + i) for arena, start, length in ranges for i in range(length)}
    assert formed("views", pieces).num_values == len(events)
    distinct = {wanted for wanted in ranges if wanted[2]}
    num_empty = any(length == 0 for _, _, length in ranges)
    assert formed("deduplicated", pieces).unique.batch_size == len(distinct) + num_empty


@every_form
@pytest.mark.parametrize("num_rows", [5, 32, 33, 400])
def test_ranges_of_all_lengths_are_copied_whole(form: Form, num_rows: int) -> None:
    """Short, medium and long ranges, and few or many of them, are copied in different ways."""
    rng = random.Random(num_rows)
    lengths = [rng.choice([0, 1, 2, 63, 64, 65, 511, 512, 513, 2000]) for _ in range(num_rows)]
    ranges = [(rng.randrange(3000), length) for length in lengths]
    arenas = [arena_of(list(range(5000)), ranges), arena_of(list(range(5000, 10_000)), ranges)]
    pieces = [piece(arena, rng.sample(range(num_rows), num_rows)) for arena in arenas]
    sequence = formed(form, pieces)
    for trait in TRAITS:
        assert seen(sequence, trait) == naive(pieces, trait)


@every_form
def test_no_examples_at_all_have_all_traits(form: Form) -> None:
    for pieces in ([piece(ARENA, [])], [piece(arena_of([], []), [])]):
        sequence = formed(form, pieces)
        assert {name: tensor.dtype for name, tensor in sequence.values.items()} == TENSORS
        assert sequence.batch_size == sequence.num_values == sequence.longest == 0
        padded = formed(form, pieces, num_padding=3)
        assert seen(padded) == seen(padded.expand()) == [[]] * 3
        assert padded.to_padded("item", 2).tolist() == [[0, 0]] * 3


# -- through the loader -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], PointerDataset]:
    """Events of a few users, every one of days 1 to 3 is asked for; and the pointers."""
    folder = tmp_path_factory.mktemp("tables")
    events = many_events(seed=5, num_events=400, num_users=6)
    store = history_of(folder / "history", events, num_buckets=2)
    dataset = PointerDataset.create(folder / "pointers", ["ratings"], num_buckets=2)
    for number in (1, 2, 3):
        asked = request_table(
            events_of_day(events, number), pa.int64(), ["user_id", "event_id"], pa.int64()
        )
        dataset.seal(day(number), asked, {"ratings": store.snapshot()})
    return events, dataset


@every_form
@pytest.mark.parametrize("max_length", [None, 0, 7])
def test_a_loaders_batches_show_the_references_sequences(
    loaded: tuple[list[dict], PointerDataset], form: Form, max_length: int | None
) -> None:
    events, dataset = loaded
    names = ["event_id", "item_id", "rating", "liked"]
    asked = [
        {"user_id": event["user_id"], "event_id": event["event_id"]}
        for number in (1, 2, 3)
        for event in events_of_day(events, number)
    ]
    wanted = [
        (row["user_id"], row["request_time"], [tuple(e[n] for n in names) for e in row["sequence"]])
        for row in fat_rows(events, asked, max_length)
    ]
    projection = Projection(names, max_length=max_length)
    loader = SequenceLoader(
        dataset.ref(), {"ratings": projection}, batch_size=32, form=form, examples_per_unit=50
    )
    found = []
    for batch in loader:
        sequence = batch.sequences["ratings"]
        assert sequence.form == form
        traits = [seen(sequence, name) for name in names]
        found += zip(
            batch.examples["user_id"].tolist(),
            batch.examples["request_time"].tolist(),
            [list(zip(*rows, strict=True)) for rows in zip(*traits, strict=True)],
            strict=True,
        )
    assert sorted(found) == sorted(wanted)


# -- whose memory -------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("size", [6, 50_000])  # small ones are not taken from the buffers
def test_changing_a_batch_in_place_changes_nothing_else(form: Form, size: int) -> None:
    arena = arena_of(list(range(size)), [(0, size), (1, size - 1), (0, 0), (0, size)])
    buffers = ArenaBuffers()
    pieces = [piece(arena, [0, 1, 2, 3])]
    before = naive(pieces)
    first = formed(form, pieces, buffers=buffers)
    second = formed(form, pieces, buffers=buffers)
    for tensor in (*first.values.values(), *first._layout):
        tensor.zero_()
    assert seen(second) == naive(pieces) == before
    assert seen(formed(form, pieces, buffers=buffers)) == before


def test_memory_of_dropped_batches_is_used_again_and_that_of_kept_ones_is_not() -> None:
    arena = arena_of(list(range(50_000)), [(0, 50_000)])
    buffers, pieces = ArenaBuffers(), [piece(arena, [0])]

    def address(sequence: JaggedSequence) -> int:
        return sequence.values["item"].data_ptr()

    kept = formed("views", pieces, buffers=buffers)
    dropped = formed("views", pieces, buffers=buffers)
    slice_of_it = kept.values["item"][:2]
    was, held = address(dropped), address(kept)
    del dropped, kept
    gc.collect()
    again = [formed("views", pieces, buffers=buffers) for _ in range(3)]
    assert was in map(address, again)
    assert held not in map(address, again)
    assert slice_of_it.tolist() == [0, 1]
