"""The schedule of an epoch: which rows of which pools make up each batch, in one global order.

Pools stand in lanes. The global order takes a batch of each lane in turn, so that batches which
follow each other come from different pools, and ranks whose number divides that of the lanes each
read pools of their own. What is left at the ends of the lanes is joined, so that only the last batch
of an epoch can be smaller. All of it is arithmetic on the pools' sizes: it depends neither on the
number of ranks nor on anything that is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Pieces", "Schedule", "by_count", "by_tokens", "make_schedule"]

I64 = npt.NDArray[np.int64]

Cut = Callable[["Pieces"], tuple[I64, bool]]
"""Where a run of examples is cut into batches: [C + 1] the examples' numbers, from 0 to all of them, and
whether the last batch is full."""


@dataclass(frozen=True)
class Pieces:
    """Runs of rows of pools, one after another: rows `[first[i], end[i])` of pool `pool[i]`."""

    pool: I64
    first: I64
    end: I64

    @classmethod
    def none(cls) -> Pieces:
        empty = np.zeros(0, np.int64)
        return cls(empty, empty, empty)

    @classmethod
    def joined(cls, parts: Sequence[Pieces]) -> Pieces:
        if not parts:
            return cls.none()
        return cls(
            np.concatenate([part.pool for part in parts]),
            np.concatenate([part.first for part in parts]),
            np.concatenate([part.end for part in parts]),
        )

    @property
    def sizes(self) -> I64:
        return self.end - self.first

    @property
    def num_examples(self) -> int:
        return int(self.sizes.sum())

    def __getitem__(self, which: slice | I64) -> Pieces:
        return Pieces(self.pool[which], self.first[which], self.end[which])

    def cut(self, bounds: I64) -> tuple[Pieces, I64]:
        """These pieces cut at examples `bounds` (from 0 to all of them), and [len(bounds)] where the
        pieces of each part begin."""
        ends = np.cumsum(self.sizes)
        begins = ends - self.sizes
        starts = np.union1d(begins[self.sizes > 0], bounds[bounds < self.num_examples])
        of = np.searchsorted(ends, starts, side="right")
        stops = np.append(starts[1:], ends[-1]) if len(starts) else starts
        first = self.first[of] + starts - begins[of]
        pieces = Pieces(self.pool[of], first, first + stops - starts)
        return pieces, np.searchsorted(starts, bounds).astype(np.int64)

    def upto(self, num_examples: int) -> Pieces:
        """The first so many examples, or all."""
        return self._split(num_examples)[0]

    def after(self, num_examples: int) -> Pieces:
        """All but the first so many examples."""
        return self._split(num_examples)[1]

    def _split(self, num_examples: int) -> tuple[Pieces, Pieces]:
        total = self.num_examples
        at = min(num_examples, total)
        pieces, where = self.cut(np.array([0, at, total]))
        middle = int(where[1]) if at else 0
        return pieces[slice(0, middle)], pieces[slice(middle, None)]


@dataclass(frozen=True)
class Schedule:
    """All batches of an epoch, in the global order that all ranks share.

    Attributes:
        pieces: of all batches, one after another.
        offsets: [num_batches + 1] batch i has the pieces `[offsets[i], offsets[i + 1])`.
        last_is_full: whether the last batch is as large as the others.
    """

    pieces: Pieces
    offsets: I64
    last_is_full: bool

    @property
    def num_batches(self) -> int:
        return len(self.offsets) - 1

    def batch(self, number: int) -> Pieces:
        return self.pieces[slice(int(self.offsets[number]), int(self.offsets[number + 1]))]


def by_count(batch_size: int) -> Cut:
    """Batches of so many examples."""

    def cut(pieces: Pieces) -> tuple[I64, bool]:
        total = pieces.num_examples
        bounds = np.append(np.arange(0, total, batch_size), total).astype(np.int64)
        return bounds, total % batch_size == 0

    return cut


def by_tokens(max_tokens: int, batch_size: int, tokens: Callable[[int], I64]) -> Cut:
    """Batches of at most so many tokens and examples; an example with more tokens is one by itself.

    Args:
        tokens: the number of a pool to [num_examples] the tokens of its examples, in its order.
    """

    def cut(pieces: Pieces) -> tuple[I64, bool]:
        parts = [
            tokens(int(pool))[first:end]
            for pool, first, end in zip(pieces.pool, pieces.first, pieces.end, strict=True)
        ]
        total = np.cumsum(np.concatenate(parts), dtype=np.int64) if parts else np.zeros(0, np.int64)
        bounds = [0]
        while bounds[-1] < len(total):
            at = bounds[-1]
            before = int(total[at - 1]) if at else 0
            end = int(np.searchsorted(total, before + max_tokens, side="right"))
            bounds.append(min(max(end, at + 1), at + batch_size))
        return np.array(bounds, np.int64), False

    return cut


def make_schedule(phases: Sequence[Sequence[Pieces]], cut: Cut) -> Schedule:
    """Cut an epoch into batches.

    Args:
        phases: the pools of each lane, in order, phase by phase; no batch of a phase comes before one
            of an earlier phase, and what is left of a phase opens the first batch of the next.
        cut: cuts a run of examples into batches.
    """
    found: list[tuple[Pieces, I64]] = []
    left = Pieces.none()
    full = True
    for lanes in phases:
        if not lanes:
            continue
        runs = _opened(left, lanes, cut)
        rests = []
        of_lane: list[tuple[Pieces, I64]] = []
        for run in runs:
            bounds, full = cut(run)
            whole = len(bounds) - 1 if full else max(len(bounds) - 2, 0)
            pieces, where = run.cut(bounds)
            of_lane.append((pieces, where[: whole + 1]))
            rests.append(pieces[slice(int(where[whole]), None)])
        found.append(_in_turn(of_lane))
        rest = Pieces.joined(rests)
        bounds, full = cut(rest)
        whole = len(bounds) - 1 if full else max(len(bounds) - 2, 0)
        pieces, where = rest.cut(bounds)
        found.append((pieces[slice(0, int(where[whole]))], where[: whole + 1]))
        left = pieces[slice(int(where[whole]), None)]
    full = left.num_examples == 0
    if not full:
        found.append((left, np.array([0, len(left.pool)], np.int64)))
    bases = np.cumsum([0, *(len(pieces.pool) for pieces, _ in found)])
    offsets = [base + where[:-1] for base, (_, where) in zip(bases[:-1], found, strict=True)]
    return Schedule(
        Pieces.joined([pieces for pieces, _ in found]),
        np.concatenate([*offsets, bases[-1:]]).astype(np.int64),
        full,
    )


def _opened(left: Pieces, lanes: Sequence[Pieces], cut: Cut) -> list[Pieces]:
    """The lanes of a phase, with what is left of the phase before at the front of the first batch: where
    a lane has too few examples to fill it, those of the next one follow."""
    runs = list(lanes)
    if not left.num_examples:
        return runs
    for number, lane in enumerate(lanes):
        left = Pieces.joined([left, lane])
        runs[number] = Pieces.none()
        bounds, full = cut(left)
        if full or len(bounds) > 2:
            break
    runs[number] = left
    return runs


def _in_turn(lanes: Sequence[tuple[Pieces, I64]]) -> tuple[Pieces, I64]:
    """The batches of some lanes, one of each in turn."""
    counts = [len(where) - 1 for _, where in lanes]
    turn = np.concatenate([np.arange(count) for count in counts])
    lane = np.repeat(np.arange(len(lanes)), counts)
    order = np.lexsort((lane, turn))
    bases = np.cumsum([0, *(len(pieces.pool) for pieces, _ in lanes)])
    begins = np.concatenate(
        [base + where[:-1] for base, (_, where) in zip(bases, lanes, strict=False)]
    )[order]
    sizes = np.concatenate([np.diff(where) for _, where in lanes])[order]
    ends = np.cumsum(sizes)
    offsets = np.concatenate([[0], ends]).astype(np.int64)
    picked = np.arange(int(offsets[-1])) + np.repeat(begins - (ends - sizes), sizes)
    return Pieces.joined([pieces for pieces, _ in lanes])[picked], offsets
