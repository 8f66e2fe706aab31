"""Writing the rows of some segments anew: read user by user, written in stripes, proved, not yet
visible. Compaction keeps all rows, erasure leaves out those of some users, and a correction those of
other windows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vlm_dagster.errors import CorruptFileError, StorageError
from vlm_dagster.hashing import Digest
from vlm_dagster.history.arena import BucketIndex
from vlm_dagster.sealed.layout import LiveFile, Placed, live_files
from vlm_dagster.sealed.reader import SegmentReader
from vlm_dagster.sealed.segments import Segment, segment_name
from vlm_dagster.sealed.table import SealedTable
from vlm_dagster.sealed.windowed import window_digests
from vlm_dagster.sealed.writer import SegmentWriter, StagedFile, sha256_of
from vlm_dagster.windows import Window

__all__ = ["Rewritten", "rewrite"]

I64 = npt.NDArray[np.int64]
Digests = dict[str, Digest]

# Decoded at once: a file's row groups hold users of all ids, so cutting finer decodes more often.
_MAX_ROWS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Rewritten:
    """Files in place but not committed, and what they stand for.

    Attributes:
        removed: the digest of the rows of users left out, by segment name of their window.
        removed_users: by bucket, the users left out and how many rows each had.
    """

    added: tuple[Placed, ...]
    replaced: tuple[LiveFile, ...]
    removed: Mapping[str, Digest]
    removed_users: Mapping[int, tuple[pa.Array, I64]]

    @property
    def num_bytes(self) -> int:
        return sum(one.file.size for one in self.added)


@dataclass(frozen=True)
class _Job:
    """What all buckets of a rewrite have in common."""

    table: SealedTable
    version: int
    sources: Sequence[str]
    segment: str
    windows: Sequence[Window]
    scratch: Path

    @property
    def digests_of(self) -> Callable[[pa.RecordBatch | pa.Table], Digests]:
        return window_digests(self.table.spec.sort_columns[1], self.windows)


@dataclass(frozen=True)
class _Written:
    """One bucket: its file, if any row is left, and who was left out of it."""

    bucket: int
    local: Path
    file: StagedFile | None
    users: pa.Array
    counts: I64
    removed: Digests


def rewrite(
    table: SealedTable,
    version: int,
    segments: Sequence[Segment],
    windows: Sequence[Window],
    *,
    without: Mapping[int, pa.Array] | None = None,
    threads: int = 2,
) -> Rewritten:
    """Write the files of adjacent segments as those of one segment, and prove from what can be read
    back then that, together with what was left out, they hold what these held before.

    Args:
        segments: of that version, oldest first.
        windows: all windows of the new segment, empty ones included; rows of other windows are not
            written.
        without: by bucket, users to leave out. Then only the files of these buckets are written.
        threads: buckets written at the same time.

    Raises:
        CorruptFileError: a file is damaged, or the proof fails.
        StorageError: storage refused.
    """
    name = segment_name(windows[0], windows[-1])
    sources = [segment.name for segment in segments]
    replaced = live_files(table, version, sources)
    if without is not None:
        replaced = [file for file in replaced if file.bucket in without]
    buckets = sorted({file.bucket for file in replaced})
    gone = without or {}
    with table.storage.scratch() as scratch, ThreadPoolExecutor(threads) as pool:
        job = _Job(table, version, sources, name, windows, scratch)
        try:
            # All are written before the first goes into place.
            written = list(pool.map(lambda b: _write(job, b, gone.get(b)), buckets))
            for one in written:
                if one.file is not None:
                    table.storage.put(one.local, one.file.path)
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(table.uri, f"rewriting segment {name}", error) from error
        proofs = list(pool.map(lambda one: _total([_read_back(job, one), one.removed]), written))
    if without is None:
        _prove_by_log(job, _total(proofs))
    else:
        for bucket, found in zip(buckets, proofs, strict=True):
            _prove_by_sources(job, bucket, found)
    return Rewritten(
        added=tuple(Placed(name, one.file) for one in written if one.file is not None),
        replaced=tuple(replaced),
        removed=_total(one.removed for one in written),
        removed_users={one.bucket: (one.users, one.counts) for one in written if len(one.users)},
    )


def _write(job: _Job, bucket: int, without: pa.Array | None) -> _Written:
    spec = job.table.spec
    local = job.scratch / f"{bucket}.parquet"
    readers = [reader for _, reader in job.table.readers(job.version, bucket, job.sources)]
    users = pa.concat_arrays([reader.users.user_ids for reader in readers]).unique().sort()
    gone = users.slice(0, 0)
    if without is not None:
        leaving = pc.is_in(users, value_set=without)
        gone, users = users.filter(leaving), users.filter(pc.invert(leaving))
    removed: Digests = {}
    for rows in _rows(readers, gone, spec.columns):
        removed = _total([removed, job.digests_of(rows)])
    counts = BucketIndex(readers, gone, spec.columns).num_events
    if not len(users):
        return _Written(bucket, local, None, gone, counts, removed)
    writer = SegmentWriter(
        local,
        spec.columns,
        {
            "kind": spec.kind,
            "table_id": job.table.table_id,
            "name": spec.name,
            "segment": job.segment,
            "bucket": bucket,
        },
        spec.sort_columns,
        spec.extremes,
        stripes=spec.stripes,
        encodings=spec.encodings,
        digests=job.digests_of,
    )
    try:
        for rows in _rows(readers, users, spec.columns):
            inside = _inside(rows, spec.sort_columns[1], job.windows)
            if inside.num_rows:
                writer.write(inside)
        if not writer.num_rows:
            writer.abandon()
            return _Written(bucket, local, None, gone, counts, removed)
        stats = writer.close()
    except BaseException:
        writer.abandon()
        raise
    path = f"segment={job.segment}/bucket={bucket}/{sha256_of(local)}.parquet"
    file = StagedFile(path, local.stat().st_size, bucket, writer.num_rows, stats)
    return _Written(bucket, local, file, gone, counts, removed)


def _rows(
    readers: Sequence[SegmentReader], users: pa.Array, schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    """The rows of some users, oldest file first, by user and then by position."""
    index = BucketIndex(readers, users, schema)
    ends = np.cumsum(index.num_events)
    low = 0
    while low < len(ends):
        done = int(ends[low - 1]) if low else 0
        high = int(np.searchsorted(ends, done + _MAX_ROWS_AT_ONCE, side="right"))
        part = index.users(low, max(high, low + 1))
        count = part.num_events
        columns = [name for name in schema.names if name != "user_id"]
        read = part.read(columns, np.zeros_like(count), count)
        owners = part.user_ids.take(pa.array(np.repeat(np.arange(len(count)), count)))
        yield pa.record_batch(
            [owners if n == "user_id" else read.columns[n] for n in schema.names], schema=schema
        )
        low = max(high, low + 1)


def _inside(rows: pa.RecordBatch, clock: str, windows: Sequence[Window]) -> pa.RecordBatch:
    """The rows that lie in a run of windows."""
    times = rows.column(clock).cast(pa.int64())
    low, high = windows[0].start_us, windows[-1].end_us
    inside = pc.and_(pc.greater_equal(times, low), pc.less(times, high))
    return rows if pc.all(inside).as_py() else rows.filter(inside)


def _read_back(job: _Job, one: _Written) -> Digests:
    """The digests of a file's rows as they can be read now, not as they were meant."""
    if one.file is None:
        return {}
    table, digests_of = job.table, job.digests_of
    reader = SegmentReader(table.storage, one.file.path)
    reader.check_owner(table.table_id, table.spec.columns)
    total: Digests = {}
    for group in range(reader.num_row_groups):
        total = _total([total, digests_of(reader.read_groups(table.spec.columns.names, [group]))])
    if total != reader.digests:
        raise CorruptFileError(
            table=table.uri,
            path=one.file.path,
            version=None,
            problem="reads back as other rows than were written, so nothing was replaced",
        )
    return total


def _prove_by_log(job: _Job, found: Digests) -> None:
    """All buckets together must hold what is left of every window by the log."""
    state = job.table.state(job.version)
    for window in job.windows:
        expected = state.left(window.index)
        if found.get(window.segment, Digest()) != expected:
            raise _unequal(job, f"segment={job.segment}", window.segment, found, expected)


def _prove_by_sources(job: _Job, bucket: int, found: Digests) -> None:
    """One bucket must hold what the footers of its files said before."""
    readers = [reader for _, reader in job.table.readers(job.version, bucket, job.sources)]
    before = _total(
        reader.digests
        if reader.has_index
        else job.digests_of(reader.read_groups(job.table.spec.columns.names))
        for reader in readers
    )
    for key in sorted({*found, *before}):
        expected = before.get(key, Digest())
        if found.get(key, Digest()) != expected:
            raise _unequal(job, f"segment={job.segment}/bucket={bucket}", key, found, expected)


def _unequal(
    job: _Job, path: str, window: str, found: Digests, expected: Digest
) -> CorruptFileError:
    return CorruptFileError(
        table=job.table.uri,
        path=path,
        version=None,
        problem=f"the rows read for window {window} have digest {found.get(window, Digest())}, but "
        f"{expected} is expected, so nothing was replaced",
    )


def _total(parts: Iterable[Digests]) -> Digests:
    total: Digests = {}
    for part in parts:
        for key, digest in part.items():
            total[key] = total.get(key, Digest()) + digest
    return total
