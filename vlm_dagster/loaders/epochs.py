"""Epochs: the order of one, worked out from the plan and the options, and each reader's share of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vlm_dagster.loaders.lengths import Lengths
from vlm_dagster.loaders.options import OrderOptions
from vlm_dagster.loaders.plan import Plan, Pool
from vlm_dagster.loaders.pool import ExampleKeys, order_of
from vlm_dagster.loaders.schedule import (
    Cut,
    Pieces,
    Schedule,
    by_count,
    by_tokens,
    make_schedule,
)
from vlm_dagster.loaders.steps import Share

__all__ = ["Epoch", "Epochs", "Slots"]

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Epoch:
    """The order of an epoch, equal on every rank.

    Attributes:
        number: from 0.
        pools: by number.
        schedule: all batches.
    """

    number: int
    pools: list[Pool]
    schedule: Schedule
    options: OrderOptions

    def share(
        self,
        *,
        begin: int,
        world_size: int,
        rank: int,
        worker: int = 0,
        num_workers: int = 1,
    ) -> Share:
        """What one reader gets of it; see `Share`."""
        return Share(
            self.schedule,
            batch_size=None if self.options.max_tokens else self.options.batch_size,
            uneven=self.options.uneven,
            begin=begin,
            world_size=world_size,
            rank=rank,
            worker=worker,
            num_workers=num_workers,
        )


class Slots:
    """Which rows of a pool each batch gets, by pool."""

    def __init__(self, schedule: Schedule) -> None:
        order = np.lexsort((schedule.pieces.first, schedule.pieces.pool))
        self._pieces = schedule.pieces[order]
        num_pools = int(self._pieces.pool.max(initial=-1)) + 1
        self._bounds = np.searchsorted(self._pieces.pool, np.arange(num_pools + 1)).tolist()

    def __call__(self, pool: int) -> Pieces:
        return self._pieces[slice(self._bounds[pool], self._bounds[pool + 1])]


class Epochs:
    """Works out epochs; the last one is kept.

    Args:
        lengths: of the examples, for batches cut by tokens.
    """

    def __init__(self, plan: Plan, options: OrderOptions, lengths: Lengths) -> None:
        self._plan = plan
        self._options = options
        self._lengths = lengths
        self._last: Epoch | None = None

    def __getitem__(self, number: int) -> Epoch:
        last = self._last
        if last is None or last.number != number:
            phases = self._plan.pools(self._options, number)
            pools = [pool for lanes in phases for lane in lanes for pool in lane]
            pools.sort(key=lambda pool: pool.number)
            whole = [[_whole(lane) for lane in lanes] for lanes in phases]
            schedule = make_schedule(whole, self._cut(number, pools))
            last = self._last = Epoch(number, pools, schedule, self._options)
        return last

    def _cut(self, epoch: int, pools: Sequence[Pool]) -> Cut:
        options = self._options
        if options.max_tokens is None:
            return by_count(options.batch_size)
        found: dict[int, I64] = {}

        def tokens(pool: int) -> I64:
            if pool not in found:
                keys = ExampleKeys.joined([self._lengths.of(unit) for unit in pools[pool].units])
                found[pool] = keys.tokens[order_of(options, epoch, pool, keys)]
            return found[pool]

        return by_tokens(options.max_tokens, options.batch_size, tokens)


def _whole(pools: Sequence[Pool]) -> Pieces:
    sizes = np.array([pool.num_examples for pool in pools], np.int64)
    return Pieces(np.array([pool.number for pool in pools], np.int64), np.zeros_like(sizes), sizes)
