"""The events that pointers span, and their checksums, in a bounded amount of memory.

Building a pointer and checking it are the same computation, so both use this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vlm_dagster.history.arena import BucketIndex, Histories
from vlm_dagster.history.buffers import ArenaBuffers
from vlm_dagster.pointers.checksum import RangeSums

__all__ = ["Span", "outer_ranges", "spans"]

I64 = npt.NDArray[np.int64]

# Events in memory at once: 32 MB of ids and times, however many users have how long histories.
_MAX_EVENTS_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Span:
    """Some of the pointers, with the events that they span.

    Attributes:
        rows: [R] which pointers; none of them is empty.
        arena: the events of their users.
        begins, ends: [R] pointer i spans `[begins[i], ends[i])` of the arena.
    """

    rows: I64
    arena: Histories
    begins: I64
    ends: I64

    def checksums(self) -> I64:
        """[R] of the arena's `event_id`s."""
        arena = self.arena
        first = arena.end_positions - arena.lengths
        users = np.searchsorted(arena.offsets, self.begins, side="right") - 1
        shift = (first - arena.offsets[:-1])[users]
        sums = RangeSums(first, arena.end_positions, users, self.begins + shift, self.ends + shift)
        some = np.flatnonzero(arena.lengths)
        places = arena.offsets[:-1][some]
        sums.add(arena.columns["event_id"], places, arena.lengths[some], places)
        return sums.checksums()


def outer_ranges(num_users: int, rank: I64, start: I64, end: I64) -> tuple[I64, I64]:
    """[U], [U] the least start and the greatest end position of each user's pointers.

    Args:
        rank: [P] the number of each pointer's user.
        start, end: [P] positions.
    """
    first = np.full(num_users, np.iinfo(np.int64).max)
    last = np.zeros(num_users, np.int64)
    np.minimum.at(first, rank, start)
    np.maximum.at(last, rank, end)
    return np.minimum(first, last), last


def spans(
    index: BucketIndex,
    columns: Sequence[str],
    rank: I64,
    end: I64,
    length: I64,
    *,
    buffers: ArenaBuffers | None = None,
) -> Iterator[Span]:
    """Read the events behind pointers, a bounded number at a time (or one user's).

    Args:
        index: of the pointers' users.
        columns: of the events.
        rank: [P] the number of each pointer's user.
        end, length: [P] the pointers.
        buffers: memory to read into; fresh memory if None.
    """
    first, last = outer_ranges(len(index.user_ids), rank, end - length, end)
    first, last = np.maximum(first, index.gone), np.maximum(last, index.gone)
    for low, high in _portions(last - first):
        rows = np.flatnonzero((rank >= low) & (rank < high) & (length > 0))
        if not len(rows):
            continue
        arena = index.users(low, high).read(
            columns, first[low:high], last[low:high], buffers=buffers
        )
        base = arena.offsets[:-1][rank[rows] - low] - first[rank[rows]]
        ends = base + end[rows]
        yield Span(rows, arena, ends - length[rows], ends)


def _portions(num_events: I64) -> Iterator[tuple[int, int]]:
    ends = np.cumsum(num_events)
    low = 0
    while low < len(ends):
        done = ends[low - 1] if low else 0
        high = int(np.searchsorted(ends, done + _MAX_EVENTS_AT_ONCE, side="right"))
        high = max(high, low + 1)
        yield low, high
        low = high
