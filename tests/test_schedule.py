"""Which examples make up which batch, and who gets it: the arithmetic against the same in lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, cycle, islice, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_dagster.loaders.options import Uneven
from vlm_dagster.loaders.schedule import (
    Cut,
    Pieces,
    Schedule,
    by_count,
    by_tokens,
    make_schedule,
)
from vlm_dagster.loaders.steps import Share

Row = tuple[int, int]  # the number of a pool, and of a row in it
Rows = list[Row]
Lanes = list[list[tuple[int, int]]]  # of each lane, its pools: their numbers and sizes
ListCut = Callable[[Rows], tuple[list[Rows], bool]]


# -- the same in lists ----------------------------------------------------------------------------


def listed(pieces: Pieces) -> Rows:
    parts = zip(pieces.pool.tolist(), pieces.first.tolist(), pieces.end.tolist(), strict=True)
    return [(pool, row) for pool, first, end in parts for row in range(first, end)]


def batches_of(schedule: Schedule) -> list[Rows]:
    return [listed(schedule.batch(number)) for number in range(schedule.num_batches)]


def pieces_of(pools: Sequence[tuple[int, int]]) -> Pieces:
    numbers = np.array([number for number, _ in pools], np.int64)
    sizes = np.array([size for _, size in pools], np.int64)
    return Pieces(numbers, np.zeros_like(sizes), sizes)


def rows_of(pools: Sequence[tuple[int, int]]) -> Rows:
    return [(number, row) for number, size in pools for row in range(size)]


def list_by_count(size: int) -> ListCut:
    return lambda rows: (
        [rows[at : at + size] for at in range(0, len(rows), size)],
        len(rows) % size == 0,
    )


def list_by_tokens(most: int, size: int, tokens: dict[Row, int]) -> ListCut:
    def cut(rows: Rows) -> tuple[list[Rows], bool]:
        found: list[Rows] = []
        for row in rows:
            last = found[-1] if found else []
            held = sum(tokens[r] for r in last)
            if not last or len(last) == size or held + tokens[row] > most:
                found.append([row])
            else:
                last.append(row)
        return found, False

    return cut


def list_schedule(phases: Sequence[Lanes], cut: ListCut) -> list[Rows]:
    found: list[Rows] = []
    left: Rows = []
    for lanes in phases:
        if not lanes:
            continue
        runs = [rows_of(lane) for lane in lanes]
        for number, run in enumerate(runs if left else []):
            left, runs[number] = left + run, []
            batches, full = cut(left)
            if full or len(batches) > 1 or number == len(runs) - 1:
                runs[number] = left
                break
        whole, rest = [], []
        for run in runs:
            batches, full = cut(run)
            keep = len(batches) if full or not batches else len(batches) - 1
            whole.append(batches[:keep])
            rest += list(chain(*batches[keep:]))
        for turn in range(max(len(lane) for lane in whole)):
            found += [lane[turn] for lane in whole if turn < len(lane)]
        batches, full = cut(rest)
        keep = len(batches) if full or not batches else len(batches) - 1
        found += batches[:keep]
        left = list(chain(*batches[keep:]))
    return found + ([left] if left else [])


def list_share(
    batches: list[Rows], size: int | None, uneven: Uneven, begin: int, world: int, rank: int
) -> list[tuple[Rows, int]]:
    """Of each step, its examples and how many empty ones follow."""
    if uneven == "drop":
        whole = [b for b in batches if size is None or len(b) == size]
        num_rounds = max(len(whole) - begin, 0) // world
        return [(whole[begin + n * world + rank], 0) for n in range(num_rounds)]
    if uneven == "keep":
        return [(batch, 0) for batch in batches[begin:][rank::world]]
    found: list[tuple[Rows, int]] = []
    for number in range(
        begin + rank, begin + -(-max(len(batches) - begin, 0) // world) * world, world
    ):
        beyond = number >= len(batches)
        batch = [] if beyond and uneven == "pad" else batches[number % len(batches)]
        missing = 0 if size is None else size - len(batch)
        if uneven == "pad":
            found.append((batch, missing))
        else:
            found.append((batch + list(islice(cycle(chain(*batches)), missing)), 0))
    return found


# -- what is drawn --------------------------------------------------------------------------------


@st.composite
def epochs(draw: st.DrawFn, max_phases: int = 3) -> list[Lanes]:
    """Pools of an epoch, by phase and lane; lanes may be empty, and pools small or large."""
    number = 0
    phases = []
    num_lanes = draw(st.integers(1, 4))
    for _ in range(draw(st.integers(1, max_phases))):
        lanes: Lanes = []
        for _ in range(num_lanes):
            sizes = draw(st.lists(st.integers(1, 12), max_size=4))
            lanes.append([(number + i, size) for i, size in enumerate(sizes)])
            number += len(sizes)
        phases.append(lanes)
    return phases


def schedule_of(phases: Sequence[Lanes], cut: Cut) -> Schedule:
    return make_schedule([[pieces_of(lane) for lane in lanes] for lanes in phases], cut)


def all_rows(phases: Sequence[Lanes]) -> Rows:
    return [row for lanes in phases for lane in lanes for row in rows_of(lane)]


batch_sizes = st.integers(1, 7)
UNEVEN: tuple[Uneven, ...] = ("keep", "drop", "repeat", "pad")


# -- the order ------------------------------------------------------------------------------------


@given(epochs(), batch_sizes)
def test_batches_by_count_are_those_of_lists(phases: list[Lanes], size: int) -> None:
    schedule = schedule_of(phases, by_count(size))
    batches = batches_of(schedule)
    assert batches == list_schedule(phases, list_by_count(size))
    assert sorted(chain(*batches)) == sorted(all_rows(phases))
    assert all(len(batch) == size for batch in batches[:-1])
    assert schedule.last_is_full == (not batches or len(batches[-1]) == size)


@given(epochs(), batch_sizes, st.integers(1, 20), st.data())
def test_batches_by_tokens_are_those_of_lists(
    phases: list[Lanes], size: int, most: int, data: st.DataObject
) -> None:
    rows = all_rows(phases)
    drawn = data.draw(st.lists(st.integers(0, 25), min_size=len(rows), max_size=len(rows)))
    tokens = dict(zip(rows, drawn, strict=True))

    def of_pool(pool: int) -> np.ndarray:
        return np.array([t for (number, _), t in tokens.items() if number == pool], np.int64)

    batches = batches_of(schedule_of(phases, by_tokens(most, size, of_pool)))
    assert batches == list_schedule(phases, list_by_tokens(most, size, tokens))
    assert sorted(chain(*batches)) == sorted(rows)
    for batch in batches:
        # An example that alone has more tokens is a batch by itself.
        assert len(batch) <= size
        assert len(batch) == 1 or sum(tokens[row] for row in batch) <= most


@given(epochs(), batch_sizes)
def test_no_example_of_a_phase_comes_before_one_of_an_earlier_phase_but_in_its_batch(
    phases: list[Lanes], size: int
) -> None:
    phase_of = {row: n for n, lanes in enumerate(phases) for lane in lanes for row in rows_of(lane)}
    batches = batches_of(schedule_of(phases, by_count(size)))
    order = [phase_of[row] for batch in batches for row in batch]
    assert order == sorted(order)


def test_a_batch_of_each_lane_comes_in_turn() -> None:
    # Golden: states of loaders depend on it. It may change only with a new state version.
    phases = [[[(0, 5), (1, 2)], [(2, 4)], [(3, 3)]]]
    assert batches_of(schedule_of(phases, by_count(2))) == [
        [(0, 0), (0, 1)], [(2, 0), (2, 1)], [(3, 0), (3, 1)],
        [(0, 2), (0, 3)], [(2, 2), (2, 3)],
        [(0, 4), (1, 0)],
        # What is left at the lanes' ends is joined.
        [(1, 1), (3, 2)],
    ]  # fmt: skip


def test_what_is_left_of_a_phase_opens_the_next_one() -> None:
    # Golden, as above.
    phases = [[[(0, 3)], [(1, 2)]], [[(2, 3)], [(3, 4)]]]
    assert batches_of(schedule_of(phases, by_count(2))) == [
        [(0, 0), (0, 1)], [(1, 0), (1, 1)],
        [(0, 2), (2, 0)], [(3, 0), (3, 1)], [(2, 1), (2, 2)], [(3, 2), (3, 3)],
    ]  # fmt: skip


def test_what_is_left_never_waits_for_a_later_example() -> None:
    # The first lane of the second phase alone cannot fill the batch that opens it.
    phases = [[[(0, 1)], []], [[(1, 1)], [(2, 5)]]]
    assert batches_of(schedule_of(phases, by_count(4))) == [
        [(0, 0), (1, 0), (2, 0), (2, 1)], [(2, 2), (2, 3), (2, 4)],
    ]  # fmt: skip


def test_a_token_budget_closes_a_batch_before_it_is_exceeded() -> None:
    # Golden, as above.
    tokens = {0: np.array([4, 3, 3, 9, 1, 0, 0]), 1: np.array([5, 5])}
    batches = batches_of(
        schedule_of([[[(0, 7)], [(1, 2)]]], by_tokens(7, 3, lambda pool: tokens[pool]))
    )
    assert batches == [
        [(0, 0), (0, 1)], [(1, 0)],
        [(0, 2)],
        [(0, 3)],  # nine tokens: more than fit, so by itself
        [(0, 4), (0, 5), (0, 6)],  # no more than three examples
        [(1, 1)],
    ]  # fmt: skip


@pytest.mark.parametrize("phases", [[], [[]], [[[], []]], [[[]], [[]]]])
def test_an_epoch_without_examples_has_no_batches(phases: list[Lanes]) -> None:
    for cut in (by_count(3), by_tokens(3, 3, lambda pool: np.zeros(0, np.int64))):
        schedule = schedule_of(phases, cut)
        assert schedule.num_batches == 0
        for uneven in UNEVEN:
            assert share_of(schedule, 3, uneven, 0, 2, 1).num_steps == 0


# -- pieces ---------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 4))), st.data())
def test_pieces_cut_as_their_rows_do(
    drawn: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    pool, first, size = (np.array([d[i] for d in drawn], np.int64) for i in range(3))
    pieces = Pieces(pool, first, first + size)
    rows = listed(pieces)
    assert pieces.num_examples == len(rows)
    at = data.draw(st.integers(0, len(rows) + 2))
    assert listed(pieces.upto(at)) == rows[:at]
    assert listed(pieces.after(at)) == rows[at:]
    inner = data.draw(st.lists(st.integers(1, max(len(rows) - 1, 1)), unique=True))
    bounds = sorted({0, len(rows), *(i for i in inner if i < len(rows))})
    cut, where = pieces.cut(np.array(bounds, np.int64))
    parts = [cut[slice(a, b)] for a, b in pairwise(where)]
    assert [listed(p) for p in parts] == [rows[a:b] for a, b in pairwise(bounds)]


# -- shares ---------------------------------------------------------------------------------------


def share_of(
    schedule: Schedule,
    size: int | None,
    uneven: Uneven,
    begin: int,
    world: int,
    rank: int,
    worker: int = 0,
    workers: int = 1,
) -> Share:
    return Share(
        schedule,
        batch_size=size,
        uneven=uneven,
        begin=begin,
        world_size=world,
        rank=rank,
        worker=worker,
        num_workers=workers,
    )


def steps_of(share: Share) -> list[tuple[Rows, int]]:
    steps = [share.step(number) for number in range(share.num_steps)]
    assert [step.number for step in steps] == list(range(share.num_steps))
    return [(listed(step.pieces), step.padding) for step in steps]


@given(epochs(2), batch_sizes, st.sampled_from(UNEVEN), st.integers(1, 5), st.data())
def test_a_share_is_that_of_lists(
    phases: list[Lanes], size: int, uneven: Uneven, world: int, data: st.DataObject
) -> None:
    schedule = schedule_of(phases, by_count(size))
    batches = batches_of(schedule)
    counted = data.draw(st.booleans())  # as by tokens: no batch is short of anything
    full = size if counted else None
    begin = data.draw(st.integers(0, len(batches)))
    shares = [share_of(schedule, full, uneven, begin, world, rank) for rank in range(world)]
    steps = [steps_of(share) for share in shares]
    assert steps == [list_share(batches, full, uneven, begin, world, r) for r in range(world)]
    # What is counted is the same on every rank, and what is not among the steps or beyond the epoch.
    rest = [row for batch in batches[begin:] for row in batch]
    given_out = [row for of_rank in steps for rows, _ in of_rank for row in rows]
    num_given = len(given_out) + sum(padding for of_rank in steps for _, padding in of_rank)
    for share in shares:
        assert share.num_left_out == (len(rest) - len(given_out) if uneven == "drop" else 0)
        assert share.num_extra == (num_given - len(rest) if uneven in ("repeat", "pad") else 0)
    if uneven != "drop":
        assert set(given_out) == set(rest) or uneven == "repeat"
        assert set(given_out) >= set(rest)
    if uneven != "keep":
        assert len({len(of_rank) for of_rank in steps}) == 1


def test_an_epoch_of_fewer_examples_than_a_batch_is_repeated_over_and_over() -> None:
    schedule = schedule_of([[[(0, 2)]]], by_count(5))
    first, second = (steps_of(share_of(schedule, 5, "repeat", 0, 2, rank)) for rank in range(2))
    assert first == second == [([(0, 0), (0, 1), (0, 0), (0, 1), (0, 0)], 0)]


@pytest.mark.parametrize("uneven", UNEVEN)
def test_after_the_last_batch_nothing_is_left_out_or_added(uneven: Uneven) -> None:
    schedule = schedule_of([[[(0, 5)]]], by_count(3))
    share = share_of(schedule, 3, uneven, 2, 2, 1)
    assert (share.num_steps, share.num_left_out, share.num_extra) == (0, 0, 0)


@given(epochs(2), batch_sizes, st.integers(1, 5), st.integers(1, 5))
def test_the_global_order_is_the_same_for_any_number_of_ranks(
    phases: list[Lanes], size: int, world: int, workers: int
) -> None:
    schedule = schedule_of(phases, by_count(size))
    found: list[Rows] = []
    ranks = [
        [
            steps_of(share_of(schedule, size, "keep", 0, world, r, w, workers))
            for w in range(workers)
        ]
        for r in range(world)
    ]
    # Workers of a rank take turns, and so do ranks.
    for number in range(schedule.num_batches):
        step, rank = divmod(number, world)
        found.append(ranks[rank][step % workers][step // workers][0])
    assert found == batches_of(schedule)
    assert sum(len(steps) for rank in ranks for steps in rank) == schedule.num_batches


@given(
    epochs(2), batch_sizes, st.sampled_from(UNEVEN), st.integers(1, 4), st.integers(1, 3), st.data()
)
def test_a_pool_is_done_at_the_last_step_that_needs_it(
    phases: list[Lanes], size: int, uneven: Uneven, world: int, workers: int, data: st.DataObject
) -> None:
    schedule = schedule_of(phases, by_count(size))
    begin = data.draw(st.integers(0, schedule.num_batches))
    for rank in range(world):
        for worker in range(workers):
            share = share_of(schedule, size, uneven, begin, world, rank, worker, workers)
            steps = [share.step(number) for number in range(share.num_steps)]
            # What fills up the end is read anew.
            first = begin + rank + worker * world
            batches = range(first, first + len(steps) * world * workers, world * workers)
            needed = [
                set(schedule.batch(b).pool.tolist()) if b < schedule.num_batches else set()
                for b in batches
            ]
            for number, step in enumerate(steps):
                later = set().union(*needed[number + 1 :])
                assert set(step.done) == needed[number] - later
