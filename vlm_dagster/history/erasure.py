"""Erasing users: their rows leave every segment of the newest version, oldest segment first.

Each segment is a commit of its own, which also says in the ledger what left (sealed/gone.py). At every
version in between, only the beginning of a user's history is gone, so positions stay true; killed
anywhere, the next call goes on where this one stopped. The first commit announces the erasure: from
then on, nobody can seal a window from before it that holds these users.

Old versions still name the files that were replaced: retiring these versions and deleting the files is
`retention/erasing.py`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import Transaction

from vlm_dagster.hashing import bucket_of
from vlm_dagster.history.arena import find_sorted
from vlm_dagster.history.rewrite import Rewritten, rewrite
from vlm_dagster.sealed.gone import Gone, Removal, user_words
from vlm_dagster.sealed.layout import StagedLayout, commit_layout
from vlm_dagster.sealed.log import TableState
from vlm_dagster.sealed.segments import Segment
from vlm_dagster.sealed.table import SealedTable
from vlm_dagster.windows import Window, format_us

__all__ = ["count_rows_of", "erase_rows"]

_WHAT = "erasure"


def count_rows_of(table: SealedTable, user_ids: pa.Array) -> tuple[int, int, list[str]]:
    """How many of these users (sorted, distinct) have rows at the newest version, how many rows,
    and in which segments."""
    version = table.state().version
    by_bucket = _by_bucket(table, user_ids)
    found: list[pa.Array] = []
    num_rows = 0
    names = []
    for segment in table.segments(version):
        before = num_rows
        for bucket, users in by_bucket.items():
            for _, reader in table.readers(version, bucket, [segment.name]):
                at = find_sorted(reader.users.user_ids, users)
                found.append(users.filter(pa.array(at >= 0)))
                num_rows += int(reader.users.counts[at[at >= 0]].sum())
        if num_rows > before:
            names.append(segment.name)
    num_users = len(pa.concat_arrays(found).unique()) if found else 0
    return num_users, num_rows, names


def erase_rows(
    table: SealedTable,
    user_ids: pa.Array,
    reason: str,
    progress: Callable[[str, int], None] | None = None,
) -> tuple[int, Removal]:
    """Take all rows of these users (sorted, distinct) out of the newest version.

    Args:
        progress: called with the name of every segment that was rewritten, and the rows that left.

    Returns:
        The version that holds none of them, and the record.

    Raises:
        CorruptFileError: a file is not what the log says.
        StorageError: storage refused. What is done so far stays; call again to go on.
    """
    by_bucket = _by_bucket(table, user_ids)
    removal = _begin(table, user_ids, by_bucket, reason)
    scanned: dict[str, frozenset[str]] = {}
    while True:
        version = table.state().version
        files = _files_of(table, version, by_bucket)
        segments = table.segments(version)
        waiting = [s for s in segments if scanned.get(s.name) != files.get(s.name, frozenset())]
        if not waiting:
            ended = _end(table, removal.id, by_bucket, scanned)
            if ended is not None:
                return ended
            continue
        segment = waiting[0]
        holders = _holders(table, version, segment, by_bucket)
        if holders:
            written = rewrite(table, version, [segment], _windows(table, segment), without=holders)
            staged = StagedLayout(_WHAT, segment.name, written.added, written.replaced)
            also = _Leaving(table, removal.id, written)
            if commit_layout(table, staged, also) is None:
                continue  # others rewrote it meanwhile: look again
            if progress is not None:
                progress(segment.name, also.num_rows)
            continue  # and look at what is left
        scanned[segment.name] = files.get(segment.name, frozenset())


def _by_bucket(table: SealedTable, user_ids: pa.Array) -> dict[int, pa.Array]:
    buckets = bucket_of(user_ids, table.spec.num_buckets)
    return {b: user_ids.filter(pa.array(buckets == b)) for b in np.unique(buckets).tolist()}


def _files_of(
    table: SealedTable, version: int, by_bucket: Mapping[int, pa.Array]
) -> dict[str, frozenset[str]]:
    """The files of each segment at a version, in the users' buckets: a segment that was corrected
    has its name still."""
    found: dict[str, set[str]] = {}
    files = table.files(version)
    mine = files.filter(pc.is_in(files["bucket"], pa.array(sorted(by_bucket), pa.int32())))
    for segment, path in zip(mine["segment"].to_pylist(), mine["path"].to_pylist(), strict=True):
        found.setdefault(segment, set()).add(path)
    return {segment: frozenset(paths) for segment, paths in found.items()}


def _windows(table: SealedTable, segment: Segment) -> list[Window]:
    return [table.spec.grid.at(index) for index in range(segment.first, segment.last + 1)]


def _holders(
    table: SealedTable, version: int, segment: Segment, by_bucket: Mapping[int, pa.Array]
) -> dict[int, pa.Array]:
    """By bucket, those of the users with rows in a segment."""
    found = {}
    for bucket, users in by_bucket.items():
        for _, reader in table.readers(version, bucket, [segment.name]):
            some = users.filter(pa.array(find_sorted(reader.users.user_ids, users) >= 0))
            if len(some):
                found[bucket] = some
    return found


class _Leaving:
    """Says in the ledger, within the commit of a rewrite, what leaves by it."""

    def __init__(self, table: SealedTable, removal: str, written: Rewritten) -> None:
        self._table = table
        self._removal = removal
        self._written = written
        self.num_rows = sum(digest.num_rows for digest in written.removed.values())

    def __call__(self, state: TableState) -> Sequence[Transaction]:
        index_of = {one.window.segment: index for index, one in state.sealed.items()}
        rows = {
            name: (state.sealed[index_of[name]].revision, digest)
            for name, digest in self._written.removed.items()
        }
        gone = state.gone.removing(rows)
        through = max(state.sealed)
        for bucket, (users, counts) in self._written.removed_users.items():
            known = self._table.gone_users(gone, bucket)
            path = known.erasing(users, counts, gone.salt, through).write(self._table.storage)
            gone = replace(gone, buckets={**gone.buckets, bucket: path})
        record = _record(gone, self._removal)
        record = replace(record, num_rows=record.num_rows + self.num_rows)
        return gone.recording(record).write(self._table.storage)[1]


def _record(gone: Gone, removal: str) -> Removal:
    (found,) = (one for one in gone.removals if one.id == removal)
    return found


def _begin(
    table: SealedTable, user_ids: pa.Array, by_bucket: Mapping[int, pa.Array], reason: str
) -> Removal:
    """Announce an erasure, or find the one that was announced and not finished."""
    begun: list[Removal] = []

    def also(state: TableState) -> Sequence[Transaction]:
        gone = state.gone.salted()
        begun[:] = [_announced(gone, user_ids) or _new(gone, user_ids, reason)]
        if begun[0] in gone.removals:
            return ()
        gone = _covering(table, gone.recording(begun[0]), by_bucket, max(state.sealed, default=-1))
        return gone.write(table.storage)[1]

    # Nothing is committed, nor put in place, for an erasure that goes on.
    found = _announced(table.state().gone, user_ids)
    if found is None:
        commit_layout(table, StagedLayout(_WHAT, f"{len(user_ids)} users", (), ()), also)
        found = begun[0]
    return found


def _name_of(gone: Gone, user_ids: pa.Array) -> str:
    """What an erasure of just these users is called."""
    words = np.sort(user_words(user_ids, gone.salt))
    return hashlib.sha256(words.astype("<u8").tobytes()).hexdigest()[:16]


def _announced(gone: Gone, user_ids: pa.Array) -> Removal | None:
    """The erasure of just these users that was begun and not finished."""
    if not gone.salt:
        return None
    name = _name_of(gone, user_ids)
    waiting = (one for one in gone.removals if not one.done and one.id.partition(".")[0] == name)
    return next(waiting, None)


def _new(gone: Gone, user_ids: pa.Array, reason: str) -> Removal:
    name = _name_of(gone, user_ids)
    earlier = sum(one.id.partition(".")[0] == name for one in gone.removals)
    return Removal(
        id=f"{name}.{earlier + 1}",
        kind="erasure",
        reason=reason,
        at=format_us(int(time.time() * 1e6)),
        num_users=len(user_ids),
        num_rows=0,
        through="",
        done=False,
    )


def _covering(
    table: SealedTable, gone: Gone, by_bucket: Mapping[int, pa.Array], through: int
) -> Gone:
    """With all of the users known as erased through a window, whether or not they have rows."""
    buckets = dict(gone.buckets)
    for bucket, users in by_bucket.items():
        none = np.zeros(len(users), np.int64)
        known = table.gone_users(gone, bucket)
        buckets[bucket] = known.erasing(users, none, gone.salt, through).write(table.storage)
    return replace(gone, buckets=buckets)


class _NotYetError(Exception):
    """Segments came in between that were not looked at."""


def _end(
    table: SealedTable,
    removal: str,
    by_bucket: Mapping[int, pa.Array],
    scanned: Mapping[str, frozenset[str]],
) -> tuple[int, Removal] | None:
    """Record that an erasure is complete, unless there are segments that it did not look at."""
    ended: list[Removal] = []

    def also(state: TableState) -> Sequence[Transaction]:
        files = _files_of(table, state.version, by_bucket)
        if any(scanned.get(segment) != paths for segment, paths in files.items()):
            raise _NotYetError
        last = max(state.sealed, default=None)
        through = "" if last is None else state.sealed[last].window.key
        gone = _covering(table, state.gone, by_bucket, -1 if last is None else last)
        ended[:] = [replace(_record(gone, removal), done=True, through=through)]
        return gone.recording(ended[0]).write(table.storage)[1]

    try:
        version = commit_layout(table, StagedLayout(_WHAT, "completed", (), ()), also)
    except _NotYetError:
        return None
    assert version is not None  # it replaces nothing
    return version, ended[0]
