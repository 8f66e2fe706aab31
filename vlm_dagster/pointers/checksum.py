"""The checksum of a sequence: the sum, modulo 2^64, of `event_words` over its positions.

Sums make it cheap: the ends of all ranges of a user cut the history into intervals, each event is
hashed once and counted in its interval, and a range is a run of intervals. Stored as a signed integer
with the same bits, because Delta has no unsigned ones.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vlm_dagster.hashing import event_sums
from vlm_dagster.sealed.gathering import gather

__all__ = ["RangeSums"]

I64 = npt.NDArray[np.int64]


class RangeSums:
    """Checksums of ranges of histories, whose events come in pieces and in any order.

    Events are told apart by their places: those of user 0 at positions `[first[0], last[0])` have the
    places from 0 on, then come those of user 1, and so on. Takes memory for ranges, none for events.
    Threads may add at the same time.

    Args:
        first, last: [U] the positions of each user's events that will come.
        rank: [P] the number of each range's user.
        starts, ends: [P] the ranges `[starts[i], ends[i])` of positions, within `first` and `last`; or
            empty ones, anywhere.
    """

    def __init__(self, first: I64, last: I64, rank: I64, starts: I64, ends: I64) -> None:
        self._offsets = np.concatenate([[0], np.cumsum(last - first)]).astype(np.int64)
        # The position of a place is the place less this.
        self._origins = self._offsets[:-1] - first
        some = np.flatnonzero(ends > starts)
        self._some, self._num = some, len(rank)
        origins = self._origins[rank[some]]
        places = np.concatenate([starts[some] + origins, ends[some] + origins])
        # Interval i ends where bound i is; after the last bound there is one more.
        self._bounds, self._at = np.unique(places, return_inverse=True)
        self._sums = np.zeros(len(self._bounds) + 1, np.uint64)
        self._lock = threading.Lock()

    def add(self, event_ids: pa.Array, rows: I64, counts: I64, places: I64) -> None:
        """Count some runs of events in.

        Args:
            event_ids: of these events, and maybe of others between them.
            rows: [R] ascending: where each run begins in `event_ids`.
            counts: [R] how many events it has, at least 1, all of one user. No two runs overlap.
            places: [R] of its first event; the others follow one by one.
        """
        if not len(rows) or not len(self._bounds):
            return
        cut = np.searchsorted(self._bounds, places, side="right")
        num_intervals = np.searchsorted(self._bounds, places + counts) - cut + 1
        owner = np.repeat(np.arange(len(rows)), num_intervals)
        ends = np.cumsum(num_intervals)
        number = np.arange(len(owner)) - (ends - num_intervals)[owner]
        interval = cut[owner] + number
        offset = np.where(number > 0, self._bounds[interval - 1] - places[owner], 0)
        user = np.searchsorted(self._offsets, places, side="right") - 1
        positions = (places - self._origins[user])[owner] + offset
        values, begins = _together(event_ids, rows, counts)
        sums = event_sums(values, begins[owner] + offset, positions)
        with self._lock:
            np.add.at(self._sums, interval, sums)

    def checksums(self) -> I64:
        """[P] the checksum of each range, once all of its events were added; 0 for an empty one."""
        upto = np.cumsum(self._sums[1:], dtype=np.uint64)
        total = np.concatenate([np.zeros(1, np.uint64), upto])[self._at]
        found = np.zeros(self._num, np.int64)
        begins, ends = total[: len(self._some)], total[len(self._some) :]
        found[self._some] = (ends - begins).view(np.int64)
        return found


def _together(values: pa.Array, rows: I64, counts: I64) -> tuple[pa.Array, I64]:
    """The values of some runs without those between them, and [R] where each run begins there."""
    begins = np.cumsum(counts) - counts
    apart = np.flatnonzero(rows[1:] != rows[:-1] + counts[:-1]) + 1
    if not len(apart):
        return values.slice(rows[0], int(counts.sum())), begins
    blocks = np.concatenate([[0], apart])
    return gather(values, rows[blocks], np.add.reduceat(counts, blocks)), begins
