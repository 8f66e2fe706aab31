"""One rank's share of a schedule: its batches, one a step, and what happens at the uneven end."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from vlm_dagster.loaders.options import Uneven
from vlm_dagster.loaders.schedule import Pieces, Schedule

__all__ = ["Share", "Step"]

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """A batch that is to come.

    Attributes:
        number: of the step, from 0 where the share begins.
        pieces: its examples.
        padding: empty examples after these.
        done: pools that no later step of this share needs, but to fill up the end.
    """

    number: int
    pieces: Pieces
    padding: int
    done: tuple[int, ...]


class Share:
    """The steps of one reader among several that take an epoch's batches in turn.

    Args:
        schedule: of the epoch.
        batch_size: examples a full batch; None where batches are cut otherwise.
        uneven: see `SequenceLoader`.
        begin: batches of the epoch that are done already, by all readers.
        world_size: ranks, each of which gets a batch a step.
        rank: this one.
        worker, num_workers: of the processes that share out this rank's steps.

    Attributes:
        num_left_out: examples that no rank gets, because `uneven` is "drop".
        num_extra: examples that ranks get beside those of the epoch, repeated or empty.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        batch_size: int | None,
        uneven: Uneven,
        begin: int,
        world_size: int,
        rank: int,
        worker: int = 0,
        num_workers: int = 1,
    ) -> None:
        self._schedule = schedule
        self._batch_size = batch_size
        self._uneven = uneven
        total = schedule.num_batches
        usable = total
        if uneven == "drop" and batch_size is not None and not schedule.last_is_full:
            usable -= 1
        left = max(usable - begin, 0)
        self.num_left_out = self.num_extra = 0
        if uneven == "drop":
            steps = left // world_size
            rest = min(begin + steps * world_size, total)
            pieces = schedule.pieces[slice(int(schedule.offsets[rest]), None)]
            self.num_left_out = pieces.num_examples
        elif uneven == "keep":
            steps = max(-(-(left - rank) // world_size), 0)
        else:
            steps = -(-left // world_size)
            extra = range(max(total - 1, begin), begin + steps * world_size)
            self.num_extra = sum(self._num_extra(batch) for batch in extra)
        numbers = np.arange(steps, dtype=np.int64)[worker::num_workers]
        self._batches = begin + numbers * world_size + rank

    @property
    def num_steps(self) -> int:
        """Of this reader."""
        return len(self._batches)

    def step(self, number: int) -> Step:
        """One of this reader's steps."""
        pieces, padding = self._content(int(self._batches[number]))
        pools = np.unique(pieces.pool)
        done = pools[self._last_use[pools] == number]
        return Step(number, pieces, padding, tuple(done.tolist()))

    def _content(self, batch: int) -> tuple[Pieces, int]:
        schedule, size = self._schedule, self._batch_size
        if batch >= schedule.num_batches:
            if self._uneven == "pad":
                return Pieces.none(), size or 0
            # The epoch begins anew.
            return self._content(batch % schedule.num_batches)
        pieces = schedule.batch(batch)
        missing = 0 if size is None else size - pieces.num_examples
        if missing and self._uneven == "pad":
            return pieces, missing
        if missing and self._uneven == "repeat":
            return self._filled(pieces, missing), 0
        return pieces, 0

    def _num_extra(self, batch: int) -> int:
        pieces, padding = self._content(batch)
        there = self._schedule.batch(batch) if batch < self._schedule.num_batches else Pieces.none()
        return pieces.num_examples + padding - there.num_examples

    def _filled(self, pieces: Pieces, missing: int) -> Pieces:
        """Filled up with examples from the epoch's beginning, over and over where it has too few."""
        parts = [pieces]
        number = 0
        while missing:
            part = self._schedule.batch(number % self._schedule.num_batches).upto(missing)
            parts.append(part)
            missing -= part.num_examples
            number += 1
        return Pieces.joined(parts)

    @cached_property
    def _last_use(self) -> I64:
        """[num_pools] the last of this reader's steps that needs each pool, what fills up the end
        aside; -1 if none does."""
        schedule, batches = self._schedule, self._batches
        pools = schedule.pieces.pool
        found = np.full(int(pools.max(initial=-1)) + 1, -1, np.int64)
        # Only the last batch of an epoch and those beyond it have other pieces than scheduled.
        plain = int(np.searchsorted(batches, schedule.num_batches - 1))
        begins = schedule.offsets[batches[:plain]]
        counts = schedule.offsets[batches[:plain] + 1] - begins
        ends = np.cumsum(counts)
        picked = np.arange(int(counts.sum())) + np.repeat(begins - (ends - counts), counts)
        np.maximum.at(found, pools[picked], np.repeat(np.arange(plain), counts))
        # What fills the end up is read anew: held, it would be so for the whole epoch.
        for number in range(plain, len(batches)):
            if batches[number] < schedule.num_batches:
                found[schedule.batch(int(batches[number])).pool] = number
        return found
