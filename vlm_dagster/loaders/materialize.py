"""One unit: its pointers and its histories, read and decoded once, for all of its examples.

Plain functions on Arrow and numpy; neither torch nor torchdata is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vlm_dagster.errors import ChecksumError
from vlm_dagster.history import ArenaBuffers, Snapshot
from vlm_dagster.history.arena import BucketIndex
from vlm_dagster.history.filling import Visit
from vlm_dagster.loaders.readable import read_asked
from vlm_dagster.pointers import PointerSnapshot
from vlm_dagster.pointers.checksum import RangeSums
from vlm_dagster.pointers.spans import outer_ranges
from vlm_dagster.schema import Projection
from vlm_dagster.sealed.gathering import gather
from vlm_dagster.sealed.gone import GoneRows

__all__ = ["Arena", "UnitData", "materialize"]

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Arena:
    """The decoded events of a unit's users in one group, and which of them each example sees.

    Attributes:
        columns: per trait, [N]; each user's events adjacent and oldest first.
        starts, lengths: [P] example i sees `[starts[i], starts[i] + lengths[i])`.
    """

    columns: dict[str, pa.Array]
    starts: I64
    lengths: I64

    def sequences(self, rows: I64) -> tuple[dict[str, pa.Array], I64]:
        """The sequences of some examples, copied one after another: columns and lengths [R]."""
        starts, lengths = self.starts[rows], self.lengths[rows]
        return {n: gather(v, starts, lengths) for n, v in self.columns.items()}, lengths


@dataclass(frozen=True)
class UnitData:
    """A unit in memory: P examples, by user and then by request time.

    Attributes:
        examples: per column, [P].
        arenas: per feature group.
        kept: [P] which examples are what their pointers were made for; None if all are.
        bad: what is wrong with those that are not.
    """

    examples: dict[str, pa.Array]
    arenas: dict[str, Arena]
    kept: npt.NDArray[np.bool_] | None = None
    bad: ChecksumError | None = None

    @property
    def num_examples(self) -> int:
        return len(self.examples["request_time"])

    @cached_property
    def numbers(self) -> dict[str, npt.NDArray[Any]]:
        """The columns of the examples that are not strings, [P] each; times as int64 microseconds."""
        return {
            name: (c.cast(pa.int64()) if pa.types.is_timestamp(c.type) else c).to_numpy(
                zero_copy_only=False
            )
            for name, c in self.examples.items()
            if not pa.types.is_string(c.type)
        }


def materialize(
    pointers: PointerSnapshot,
    histories: Mapping[str, Snapshot],
    projections: Mapping[str, Projection],
    bucket: int,
    user_ids: pa.Array,
    *,
    columns: Sequence[str],
    verify: bool,
    whole: bool | None = None,
    buffers: ArenaBuffers | None = None,
) -> UnitData:
    """Read the examples of some users, and the stretches of history that they point into.

    Examples that cannot be rebuilt, because events are gone, are left out; the plan knows how many.
    Those whose checksums do not match are marked: whoever asked decides what that means.

    Args:
        histories: one snapshot a group, in which all of the pointers hold.
        projections: what to read of each group.
        user_ids: [U] of this bucket, sorted and distinct.
        columns: the examples' columns to return.
        verify: recompute every pointer's checksum from the events first. It spans the pointer's
            full length, so this reads the ids of events that the projection cuts off too; they are
            hashed as they are decoded, and take no memory.
        whole: leave out examples of which something that only their checksums span is gone. None
            does so where they are verified.
        buffers: memory to read into; it comes back when the unit is dropped. Fresh memory if None.

    Raises:
        PinError, CorruptFileError: the histories cannot be what was pinned.
    """
    asked = read_asked(
        pointers,
        histories,
        projections,
        bucket,
        user_ids,
        columns=columns,
        checksums=verify,
        whole=verify if whole is None else whole,
        buffers=buffers,
    ).only_readable()
    rank = asked.rank
    arenas = {}
    kept, wrong = np.ones(len(rank), bool), []
    for group, projection in projections.items():
        snapshot, pointer, gone = histories[group], asked.pointers[group], asked.gone[group]
        index, arena, sums = _arena(
            snapshot, projection, user_ids, rank, pointer, gone, verify, buffers
        )
        arenas[group] = arena
        if sums is not None:
            matches = _matches(index, rank, pointer, gone, sums)
            kept &= matches
            if not matches.all():
                wrong.append((snapshot, pointer, matches))
    if not wrong:
        return UnitData(asked.columns, arenas)
    return UnitData(asked.columns, arenas, kept, _error(user_ids, rank, wrong))


def _arena(
    snapshot: Snapshot,
    projection: Projection,
    user_ids: pa.Array,
    rank: I64,
    pointer: Mapping[str, I64],
    gone: GoneRows,
    verify: bool,
    buffers: ArenaBuffers | None,
) -> tuple[BucketIndex, Arena, I64 | None]:
    """Where the events lie; the events; and, if they are verified, [P] the checksums of those that are
    there."""
    end, length = pointer["end_position"], pointer["length"]
    num_users = len(user_ids)
    index = snapshot.index_through(user_ids, outer_ranges(num_users, rank, end, end)[1])
    begin = end - length
    if projection.max_length is not None:
        length = np.minimum(length, projection.max_length)
    first, last = _needed(index, rank, end - length, end)
    visits: dict[str, Visit] = {}
    sums: RangeSums | None = None
    if verify:
        start = np.maximum(begin, index.gone[rank])
        low, high = _needed(index, rank, start, end)
        sums = RangeSums(low, high, rank, start, end)
        visits = {"event_id": sums.add}
        if not (np.array_equal(low, first) and np.array_equal(high, last)):
            # Apart from what is projected: pointers may span far more than that.
            index.read([], low, high, visits=visits)
            visits = {}
    names = projection.columns(snapshot.group)
    read = index.read(names, first, last, visits=visits, buffers=buffers)
    base = (read.offsets[:-1] - first)[rank]
    arena = Arena(read.columns, np.where(length > 0, base + end - length, 0), length)
    return index, arena, None if sums is None else sums.checksums()


def _needed(index: BucketIndex, rank: I64, start: I64, end: I64) -> tuple[I64, I64]:
    """[U], [U] the positions of each user that ranges `[start, end)`, [P], reach over."""
    # Empty ranges lie anywhere, even among what is gone; all others lie past it (readable.py).
    some = end > start
    first, last = outer_ranges(len(index.user_ids), rank[some], start[some], end[some])
    return np.maximum(first, index.gone), np.maximum(last, index.gone)


def _matches(
    index: BucketIndex, rank: I64, pointer: Mapping[str, I64], gone: GoneRows, sums: I64
) -> npt.NDArray[np.bool_]:
    """[P] whether the events behind each pointer sum up to its checksum.

    Args:
        sums: [P] of the events that are there.
    """
    end, length = pointer["end_position"], pointer["length"]
    # What is gone at the beginning of a whole history is known by its sum (readable.py).
    cut = (length > 0) & (end - length < index.gone[rank])
    found = sums + np.where(cut, gone.checksums[rank], 0).view(np.int64)
    return np.asarray(found == pointer["checksum"])


def _error(
    user_ids: pa.Array,
    rank: I64,
    wrong: Sequence[tuple[Snapshot, Mapping[str, I64], npt.NDArray[np.bool_]]],
) -> ChecksumError:
    """Of the first pointer that does not match, and how many there are in all groups.

    Args:
        wrong: per group that has any, its pointers, and which of them match.
    """
    snapshot, pointer, matches = wrong[0]
    row = int(np.argmin(matches))
    return ChecksumError(
        group=snapshot.group.name,
        user_id=user_ids[int(rank[row])].as_py(),
        end_position=int(pointer["end_position"][row]),
        num_bad=sum(int(np.count_nonzero(~matches)) for _, _, matches in wrong),
    )
