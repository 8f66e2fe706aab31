"""Dropping the oldest windows of a history by age. Positions stay what they were: the ledger keeps how
many events of every user are gone (sealed/gone.py).

Whole segments go, in one commit that reads no row but the event ids, whose checksums the ledger keeps:
so pointers that begin before what was dropped can still be verified.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from deltalake import Transaction

from vlm_dagster.hashing import event_words
from vlm_dagster.history.arena import BucketIndex
from vlm_dagster.sealed.gone import Gone, Removal
from vlm_dagster.sealed.layout import StagedLayout, commit_layout, live_files
from vlm_dagster.sealed.log import TableState
from vlm_dagster.sealed.segments import Segment
from vlm_dagster.sealed.table import SealedTable
from vlm_dagster.windows import Window, format_us

__all__ = ["DropReport", "drop_before"]

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

# Ids in memory at once.
_MAX_EVENTS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class DropReport:
    """What a drop did, or with `dry_run` would do.

    Attributes:
        version: the newest version afterwards.
        windows: keys of the windows whose events went, oldest first.
        num_rows, num_files, num_bytes: of these. The files stay until old versions are collected.
        kept_for_segment: keys of windows before the limit that stay, because they lie in one
            segment with later ones.
    """

    version: int
    windows: tuple[str, ...]
    num_rows: int
    num_files: int
    num_bytes: int
    kept_for_segment: tuple[str, ...]
    dry_run: bool


def drop_before(table: SealedTable, limit: Window, reason: str, *, dry_run: bool) -> DropReport:
    """Drop the segments that end before a window; see `HistoryStore.drop_before`."""
    while True:
        state = table.state()
        covered = {one.window.index for one in state.covered}
        before = [one for one in table.segments(state.version) if one.first < limit.index]
        going = [one for one in before if one.last < limit.index and one.last in covered]
        files = live_files(table, state.version, [one.name for one in going])
        indices = _not_dropped(state, going, limit.index)
        staying = _not_dropped(state, [one for one in before if one not in going], limit.index)
        report = DropReport(
            version=state.version,
            windows=tuple(state.grid.at(i).key for i in indices),
            num_rows=sum(state.left(i).num_rows for i in indices),
            num_files=len(files),
            num_bytes=sum(file.size for file in files),
            kept_for_segment=tuple(state.grid.at(i).key for i in staying),
            dry_run=dry_run,
        )
        if dry_run or not going:
            return report
        first, last = report.windows[0], report.windows[-1]
        staged = StagedLayout("drop", f"{first} to {last}", (), tuple(files))
        also = _Dropping(table, state, going, reason, last, report.num_rows)
        version = commit_layout(table, staged, also)
        if version is not None:
            return replace(report, version=version)


def _not_dropped(state: TableState, segments: Sequence[Segment], limit: int) -> list[int]:
    """The windows of some segments before a limit, without those that were dropped before: a
    segment that was compacted since still counts these as its own."""
    through = [
        state.grid.parse(one.through).index for one in state.gone.removals if one.kind == "drop"
    ]
    first = max(through, default=-1) + 1
    return [i for s in segments for i in range(max(s.first, first), min(s.last + 1, limit))]


class _Dropping:
    """Says in the ledger, within the commit that drops, what is dropped by it."""

    def __init__(
        self,
        table: SealedTable,
        before: TableState,
        going: Sequence[Segment],
        reason: str,
        through: str,
        num_rows: int,
    ) -> None:
        self._table = table
        self._indices = [i for one in going for i in range(one.first, one.last + 1)]
        self._removal = Removal(
            id=secrets.token_hex(8),
            kind="drop",
            reason=reason,
            at=format_us(int(time.time() * 1e6)),
            num_users=0,
            num_rows=num_rows,
            through=through,
            done=True,
        )
        names = [one.name for one in going]
        self._users = {
            bucket: _counts_and_checksums(table, before, bucket, names)
            for bucket in range(table.spec.num_buckets)
            if table.readers(before.version, bucket, names)
        }

    def __call__(self, state: TableState) -> Sequence[Transaction]:
        gone = _dropped(self._table, state.gone, self._users)
        left = {
            state.sealed[i].window.segment: (state.sealed[i].revision, state.left(i))
            for i in self._indices
        }
        removal = replace(self._removal, num_users=sum(len(u) for u, _, _ in self._users.values()))
        return gone.removing(left).recording(removal).write(self._table.storage)[1]


def _dropped(table: SealedTable, gone: Gone, users: dict[int, tuple[pa.Array, I64, U64]]) -> Gone:
    buckets = dict(gone.buckets)
    for bucket, (ids, counts, checksums) in users.items():
        known = table.gone_users(gone, bucket)
        buckets[bucket] = known.dropping(ids, counts, checksums).write(table.storage)
    return replace(gone, buckets=buckets)


def _counts_and_checksums(
    table: SealedTable, state: TableState, bucket: int, names: Sequence[str]
) -> tuple[pa.Array, I64, U64]:
    """The users of a bucket with events in some segments, how many, and the sums of their words."""
    readers = [reader for _, reader in table.readers(state.version, bucket, names)]
    users = pa.concat_arrays([reader.users.user_ids for reader in readers]).unique().sort()
    gone = table.gone_of(state.gone, users).counts
    index = BucketIndex(readers, users, table.spec.columns, gone=gone)
    counts = index.num_events - gone
    sums = np.zeros(len(users), np.uint64)
    ends = np.cumsum(counts)
    low = 0
    while low < len(users):
        done = int(ends[low - 1]) if low else 0
        high = max(int(np.searchsorted(ends, done + _MAX_EVENTS_AT_ONCE, side="right")), low + 1)
        part = index.users(low, high)
        read = part.read(["event_id"], part.gone, part.num_events)
        first = np.repeat(part.gone - read.offsets[:-1], read.lengths)
        words = event_words(read.columns["event_id"], np.arange(read.num_events) + first)
        sums[low:high] = np.add.reduceat(words, read.offsets[:-1])
        low = high
    return users, counts, sums
