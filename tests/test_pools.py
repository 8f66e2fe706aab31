"""Pools: which units are shuffled with each other, in which order their examples come, who gets which."""

from __future__ import annotations

from collections import Counter
from itertools import chain, groupby, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import day
from unit_sources import World, opened, world_in

from vlm_dagster import HistoryStore
from vlm_dagster.loaders.lengths import Lengths
from vlm_dagster.loaders.materialize import Arena, UnitData
from vlm_dagster.loaders.options import OrderOptions
from vlm_dagster.loaders.plan import Plan, Pool, Unit
from vlm_dagster.loaders.pool import ExampleKeys, PoolData, dealt, order_of
from vlm_dagster.loaders.schedule import Pieces


def options_of(**changed: Any) -> OrderOptions:
    default: dict[str, Any] = {
        "batch_size": 8, "max_tokens": None, "balance": None, "balance_length": 16, "uneven": "keep",
        "seed": 7, "order": "shuffled", "mix": 3, "lanes": 4, "examples_per_unit": 25,
        "events_per_unit": 1_000, "events_per_pool": 1_000,
    }  # fmt: skip
    return OrderOptions(**{**default, **changed})


def keys_of(user_sizes: list[int], times: list[int] | None = None) -> ExampleKeys:
    num_examples = sum(user_sizes)
    users = np.repeat(np.arange(len(user_sizes)), user_sizes)
    return ExampleKeys.of(
        pa.array(users),
        pa.array(times or [0] * num_examples, pa.int64()).cast(pa.timestamp("us", "UTC")),
        {"ratings": np.arange(num_examples)},
        16,
    )


user_sizes = st.lists(st.integers(1, 6), min_size=1, max_size=8)


# -- the order within a pool ----------------------------------------------------------------------


@given(user_sizes, st.integers(0, 3), st.integers(0, 3), st.integers(0, 9))
def test_a_users_examples_stay_together_and_in_order_where_nothing_is_mixed(
    sizes: list[int], seed: int, epoch: int, number: int
) -> None:
    order = order_of(options_of(mix=0, seed=seed), epoch, number, keys_of(sizes)).tolist()
    assert sorted(order) == list(range(sum(sizes)))
    users = np.repeat(np.arange(len(sizes)), sizes)[order].tolist()
    assert len([user for user, _ in groupby(users)]) == len(sizes)
    for before, after in pairwise(order):
        assert users[order.index(before)] != users[order.index(after)] or after == before + 1


@given(user_sizes, st.integers(1, 5), st.integers(0, 3))
def test_a_mixed_pool_is_a_permutation_that_only_seed_epoch_and_number_decide(
    sizes: list[int], mix: int, epoch: int
) -> None:
    order = order_of(options_of(mix=mix), epoch, 5, keys_of(sizes)).tolist()
    assert sorted(order) == list(range(sum(sizes)))
    assert order == order_of(options_of(mix=mix), epoch, 5, keys_of([1] * sum(sizes))).tolist()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_a_pool_by_time_is_sorted_and_ties_stay_in_file_order(times: list[int]) -> None:
    order = order_of(options_of(order="time"), 0, 0, keys_of([len(times)], times)).tolist()
    assert order == sorted(range(len(times)), key=lambda row: (times[row], row))


def test_a_stored_pool_is_as_it_lies_in_the_file() -> None:
    assert order_of(options_of(order="stored"), 2, 3, keys_of([2, 3])).tolist() == [0, 1, 2, 3, 4]


def test_the_shuffles_are_these() -> None:
    # Golden: every state that is kept anywhere depends on them. They may change only together with
    # the version of loader states.
    def orders(mix: int) -> list[list[int]]:
        return [
            order_of(options_of(mix=mix, seed=seed), epoch, number, keys_of([2, 3, 1])).tolist()
            for seed, epoch, number in ((7, 0, 0), (8, 0, 0), (7, 1, 0), (7, 0, 1))
        ]

    assert orders(3) == GOLDEN_MIXED
    assert orders(0) == GOLDEN_TOGETHER


GOLDEN_MIXED = [[5, 1, 4, 2, 0, 3], [4, 0, 1, 5, 2, 3], [5, 4, 2, 1, 0, 3], [0, 2, 5, 3, 1, 4]]
GOLDEN_TOGETHER = [[2, 3, 4, 5, 0, 1], [0, 1, 2, 3, 4, 5], [5, 2, 3, 4, 0, 1], [2, 3, 4, 0, 1, 5]]


# -- dealing --------------------------------------------------------------------------------------


@st.composite
def slots_of(draw: st.DrawFn) -> Pieces:
    """The rows of a pool that its batches get: all of them, in any order of batches."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=7))
    ends = np.cumsum(sizes)
    order = np.array(draw(st.permutations(range(len(sizes)))))
    return Pieces(np.zeros(len(sizes), np.int64), (ends - sizes)[order], ends[order])


@given(slots_of(), st.data())
def test_dealing_keeps_every_example_and_the_sizes_of_batches(
    slots: Pieces, data: st.DataObject
) -> None:
    num_examples = slots.num_examples
    order = np.array(data.draw(st.permutations(range(num_examples))), np.int64)
    cost = np.array(
        data.draw(st.lists(st.integers(0, 50), min_size=num_examples, max_size=num_examples))
    )
    found = dealt(order, cost, slots)
    assert sorted(found.tolist()) == list(range(num_examples))


@pytest.mark.parametrize("num_examples", [400, 1_034, 3_000])
def test_batches_that_get_few_examples_of_a_pool_do_not_get_the_dearest_ones(
    num_examples: int,
) -> None:
    cost = np.random.default_rng(1).lognormal(0, 1, num_examples)
    bounds = np.unique(np.append(np.arange(100, num_examples, 256), [0, num_examples]))
    slots = Pieces(np.zeros(len(bounds) - 1, np.int64), bounds[:-1], bounds[1:])
    found = dealt(np.arange(num_examples), cost, slots)
    means = np.add.reduceat(cost[found], bounds[:-1]) / np.diff(bounds)
    undealt = np.add.reduceat(cost, bounds[:-1]) / np.diff(bounds)
    assert np.ptp(means) < np.ptp(undealt)
    assert abs(means - cost.mean()).max() < 0.35 * cost.mean()


@given(st.integers(2, 9), st.integers(1, 20), st.integers(0, 1_000))
def test_batches_of_dealt_examples_cost_the_same_but_for_one_example(
    num_batches: int, size: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    cost = (rng.pareto(1.5, num_batches * size) * 100).astype(np.int64)
    ends = np.arange(1, num_batches + 1) * size
    slots = Pieces(np.zeros(num_batches, np.int64), ends - size, ends)
    order = rng.permutation(len(cost))

    def spread(order: np.ndarray) -> int:
        return int(np.ptp(cost[order].reshape(num_batches, size).sum(1)))

    # To and fro: what one round gives unevenly, the next one takes back, but for a step's difference.
    assert spread(dealt(order, cost, slots)) <= int(np.ptp(cost))


def test_examples_of_equal_cost_are_dealt_in_their_shuffled_order() -> None:
    # Golden, as above.
    slots = Pieces(np.zeros(2, np.int64), np.array([0, 3]), np.array([3, 5]))
    order = np.array([4, 2, 0, 1, 3])
    assert dealt(order, np.full(5, 9), slots).tolist() == [4, 0, 1, 2, 3]
    assert dealt(order, np.array([1, 2, 3, 4, 5]), slots).tolist() == [4, 2, 1, 3, 0]


# -- the pools of an epoch ------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn, by_window: bool = False) -> Plan:
    sizes = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 400)), max_size=20))
    windows = sorted(draw(st.integers(0, 2)) for _ in sizes) if by_window else [None] * len(sizes)
    units = [
        Unit(None if window is None else day(window), 0, number, number + 1, examples, events)
        for number, (window, (examples, events)) in enumerate(zip(windows, sizes, strict=True))
    ]
    return Plan(tuple(units), {})


def flat(phases: list[list[list[Pool]]]) -> list[Pool]:
    pools = [pool for lanes in phases for lane in lanes for pool in lane]
    return sorted(pools, key=lambda pool: pool.number)


@given(plans(), st.integers(0, 5), st.integers(1, 5), st.sampled_from(["shuffled", "stored"]))
def test_every_unit_is_in_one_pool_within_its_limits(
    plan: Plan, mix: int, lanes: int, order: Any
) -> None:
    phases = plan.pools(options_of(mix=mix, lanes=lanes, order=order), 0)
    assert [len(found) for found in phases] == [lanes]
    pools = flat(phases)
    assert [pool.number for pool in pools] == list(range(len(pools)))
    units = list(chain(*(pool.units for pool in pools)))
    assert sorted(units) == list(range(len(plan.units)))
    if order == "stored":
        assert units == list(range(len(plan.units)))
    for pool in pools:
        assert pool.num_examples == sum(plan.units[unit].num_examples for unit in pool.units)
        num_events = sum(plan.units[unit].num_events for unit in pool.units)
        assert len(pool.units) == 1 or (len(pool.units) <= mix and num_events <= 1_000)


@given(plans(), st.integers(1, 5))
def test_lanes_have_equally_many_examples_but_for_one_pool(plan: Plan, lanes: int) -> None:
    (found,) = plan.pools(options_of(lanes=lanes), 0)
    sizes = [sum(pool.num_examples for pool in lane) for lane in found]
    largest = max((pool.num_examples for lane in found for pool in lane), default=0)
    assert max(sizes) - min(sizes) <= largest


@given(plans(by_window=True), st.integers(0, 2))
def test_pools_never_straddle_windows_read_one_after_another(plan: Plan, epoch: int) -> None:
    phases = plan.pools(options_of(order="time"), epoch)
    windows = [{plan.units[u].window for p in flat([lanes]) for u in p.units} for lanes in phases]
    assert all(len(found) == 1 for found in windows if plan.units)
    assert list(chain(*windows)) == sorted({unit.window for unit in plan.units})  # type: ignore[type-var]
    assert Counter(u for p in flat(phases) for u in p.units) == Counter(range(len(plan.units)))


def test_other_epochs_and_seeds_pool_other_units() -> None:
    plan = Plan(tuple(Unit(None, 0, n, n + 1, 3, 10) for n in range(40)), {})
    pools = [
        flat(plan.pools(options_of(seed=seed), epoch)) for seed, epoch in ((7, 0), (7, 1), (8, 0))
    ]
    assert pools[0] != pools[1] != pools[2] != pools[0]
    assert pools[0] == flat(plan.pools(options_of(lanes=3), 0))
    # Golden, as above.
    assert [pool.units for pool in pools[0][:4]] == GOLDEN_UNITS


GOLDEN_UNITS = [(20, 33, 15), (31, 36, 30), (21, 29, 28), (37, 9, 10)]


# -- a pool in memory -----------------------------------------------------------------------------


def unit_of(num_examples: int, kept: list[bool] | None = None) -> UnitData:
    none = np.zeros(num_examples, np.int64)
    return UnitData(
        {"user_id": pa.array(range(num_examples))},
        {"ratings": Arena({}, none, none)},
        None if kept is None else np.array(kept),
    )


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_rows_of_a_pool_are_those_of_its_units_that_are_left(
    sizes: list[int], data: st.DataObject
) -> None:
    kinds = data.draw(
        st.lists(
            st.sampled_from(["whole", "lost", "masked"]), min_size=len(sizes), max_size=len(sizes)
        )
    )
    units: list[UnitData | None] = []
    left: list[tuple[int, int]] = []  # unit and row of every example, in file order
    for number, (size, kind) in enumerate(zip(sizes, kinds, strict=True)):
        kept = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
        mask = [kind == "whole" or (kind == "masked" and ok) for ok in kept]
        left += [(number, row) if ok else (-1, row) for row, ok in enumerate(mask)]
        units.append(None if kind == "lost" else unit_of(size, kept if kind == "masked" else None))
    order = np.array(data.draw(st.permutations(range(sum(sizes)))))
    pool = PoolData(units, sizes, order)
    first = data.draw(st.integers(0, len(order)))
    end = data.draw(st.integers(first, len(order)))
    found = [
        (next(n for n, u in enumerate(units) if u is unit), row)
        for unit, rows in pool.rows(first, end)
        for row in rows.tolist()
    ]
    # A batch is a set: its examples stand in file order.
    assert found == [left[place] for place in sorted(order[first:end]) if left[place][0] >= 0]


# -- lengths --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["whole", "dropped by age"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("tables")
    world = world_in(folder, num_events=300)
    if request.param == "whole":
        return world
    HistoryStore.open(folder / "ratings").drop_before(day(1))
    return opened(folder)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"balance": "flops", "balance_length": 9}, ["user_ends", "tokens", "flops"]),
        ({"order": "time"}, ["user_ends", "tokens", "request_time"]),
    ],
)
def test_lengths_are_those_that_reading_finds(
    world: World, options: dict[str, Any], names: list[str]
) -> None:
    lengths = Lengths(
        world.plan,
        world.pointers,
        world.histories,
        world.projections,
        verify=True,
        options=options_of(**options),
    )
    source = world.direct()
    assert len(world.plan.units) > 3
    for number, unit in enumerate(world.plan.units):
        read = source.read(unit, world.plan.users_of(unit), verify=True)
        wanted = ExampleKeys.of(
            read.examples["user_id"],
            read.examples["request_time"],
            {group: arena.lengths for group, arena in read.arenas.items()},
            9,
        )
        found = lengths.of(number)
        for name in names:
            assert getattr(found, name).tolist() == getattr(wanted, name).tolist(), name
        flops = sum(arena.lengths * (arena.lengths + 9) for arena in read.arenas.values())
        assert wanted.flops.tolist() == flops.tolist()
