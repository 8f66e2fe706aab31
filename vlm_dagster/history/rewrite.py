"""Writing a run of segments as one: read user by user, written in stripes, proved, not yet visible."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from vlm_dagster.errors import CorruptFileError, StorageError
from vlm_dagster.hashing import Digest
from vlm_dagster.history.arena import BucketIndex
from vlm_dagster.sealed.layout import LiveFile, StagedLayout
from vlm_dagster.sealed.reader import SegmentReader
from vlm_dagster.sealed.segments import Segment, segment_name
from vlm_dagster.sealed.table import SealedTable
from vlm_dagster.sealed.windowed import window_digests
from vlm_dagster.sealed.writer import SegmentWriter, StagedFile, sha256_of
from vlm_dagster.windows import Window

__all__ = ["stage_merge"]

# Decoded at once: a file's row groups hold users of all ids, so cutting finer decodes more often.
_MAX_ROWS_AT_ONCE = 4_000_000


def stage_merge(
    table: SealedTable,
    version: int,
    segments: Sequence[Segment],
    windows: Sequence[Window],
    *,
    threads: int = 2,
) -> StagedLayout:
    """Write the files of adjacent segments as those of one segment, and prove these equal.

    Args:
        segments: of that version, oldest first.
        windows: all windows of the new segment, empty ones included.
        threads: buckets written at the same time.

    Raises:
        CorruptFileError: a file is damaged, or what was written does not add up to the digests
            that the windows were sealed with.
        StorageError: storage refused.
    """
    state = table.state(version)
    name = segment_name(windows[0], windows[-1])
    names = [segment.name for segment in segments]
    replaced = tuple(
        LiveFile(row["path"], row["size_bytes"], row["segment"], row["bucket"])
        for row in table.files(version).to_pylist()
        if row["segment"] in set(names)
    )
    buckets = sorted({file.bucket for file in replaced})
    with table.storage.scratch() as scratch, ThreadPoolExecutor(threads) as pool:
        try:
            # All are written before the first goes into place.
            written = list(
                pool.map(
                    lambda bucket: _write(table, version, bucket, names, name, windows, scratch),
                    buckets,
                )
            )
            for local, file in written:
                table.storage.put(local, file.path)
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(table.uri, f"rewriting segment {name}", error) from error
        digests_of = window_digests(table.spec.sort_columns[1], windows)
        proofs = list(pool.map(lambda pair: _read_back(table, pair[1].path, digests_of), written))
    for window in windows:
        found = Digest.sum(proof.get(window.segment, Digest()) for proof in proofs)
        if str(found) != state.sealed[window.index].digest:
            raise CorruptFileError(
                table=table.uri,
                path=f"segment={name}",
                version=None,
                problem=f"the rows read for window {window.key} have digest {found}, but it was "
                f"sealed with {state.sealed[window.index].digest}, so nothing was replaced",
            )
    return StagedLayout(name, tuple(file for _, file in written), replaced, "compaction")


def _write(
    table: SealedTable,
    version: int,
    bucket: int,
    names: Sequence[str],
    name: str,
    windows: Sequence[Window],
    scratch: Path,
) -> tuple[Path, StagedFile]:
    spec = table.spec
    local = scratch / f"{bucket}.parquet"
    header = {
        "kind": spec.kind,
        "table_id": table.table_id,
        "name": spec.name,
        "segment": name,
        "bucket": bucket,
    }
    writer = SegmentWriter(
        local,
        spec.columns,
        header,
        spec.sort_columns,
        spec.extremes,
        stripes=spec.stripes,
        encodings=spec.encodings,
        digests=window_digests(spec.sort_columns[1], windows),
    )
    try:
        readers = [reader for _, reader in table.readers(version, bucket, names)]
        for rows in _rows(readers, spec.columns):
            writer.write(rows)
        stats = writer.close()
    except BaseException:
        writer.abandon()
        raise
    path = f"segment={name}/bucket={bucket}/{sha256_of(local)}.parquet"
    return local, StagedFile(path, local.stat().st_size, bucket, writer.num_rows, stats)


def _rows(readers: Sequence[SegmentReader], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """All rows of some files, oldest file first, by user and then by position."""
    users = pa.concat_arrays([reader.users.user_ids for reader in readers]).unique().sort()
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


def _read_back(
    table: SealedTable, path: str, digests_of: Callable[[pa.Table], dict[str, Digest]]
) -> dict[str, Digest]:
    """The digests of a file's rows as they can be read now, not as they were meant."""
    reader = SegmentReader(table.storage, path)
    reader.check_owner(table.table_id, table.spec.columns)
    total: dict[str, Digest] = {}
    for group in range(reader.num_row_groups):
        rows = reader.read_groups(table.spec.columns.names, [group])
        for key, digest in digests_of(rows).items():
            total[key] = total.get(key, Digest()) + digest
    if total != reader.digests:
        raise CorruptFileError(
            table=table.uri,
            path=path,
            version=None,
            problem="reads back as other rows than were written, so nothing was replaced",
        )
    return total
