"""The first half of sealing: sorted rows become files in place, which nobody sees yet."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from vlm_dagster.hashing import Digest, digest_rows, run_lengths
from vlm_dagster.sealed.spec import TableSpec
from vlm_dagster.sealed.writer import SegmentWriter, StagedFile, sha256_of
from vlm_dagster.storage import Storage
from vlm_dagster.windows import Window

__all__ = ["Correction", "StagedWindow", "write_window"]

Rows = Iterator[pa.RecordBatch]


@dataclass(frozen=True)
class Correction:
    """Why a sealed window is to be replaced, and which revision of it.

    Attributes:
        name: of the new revision.
        revision, digest: of the one that is replaced.
    """

    reason: str
    name: str
    revision: int
    digest: str


@dataclass(frozen=True)
class StagedWindow:
    """Files that are in place but not committed. Picklable; holds no credentials.

    Attributes:
        already_sealed: the window was sealed before staging began, so no files were written:
            committing compares the digests.
        correction: the window is to replace one that is sealed.
    """

    uri: str
    table_id: str
    window: Window
    digest: str
    num_rows: int
    num_users: int
    num_duplicates: int
    files: tuple[StagedFile, ...]
    facts: dict[str, Any]
    already_sealed: bool
    correction: Correction | None = None

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class _Bucket:
    """What became of the rows of a bucket: a finished file, unless only their digest was wanted."""

    local: Path
    file: StagedFile | None
    digest: Digest
    num_users: int


def write_window(
    storage: Storage,
    spec: TableSpec,
    table_id: str,
    window: Window,
    map_buckets: Callable[[Callable[[int, Rows], _Bucket]], list[_Bucket]],
    finish: Callable[[Rows], Rows],
    scratch: Path,
    *,
    dry: bool,
) -> tuple[list[StagedFile], Digest, int]:
    """Write the rows of every bucket into one file, and put these in place.

    Args:
        map_buckets: an engine's, over the window's rows.
        finish: turns the sorted rows of a bucket into those that are stored.
        scratch: a local folder.
        dry: only compute the digest; write nothing.

    Returns:
        The files, the digest of all rows, and the number of users.
    """

    def digested(bucket: int, rows: Rows) -> _Bucket:
        digest, num_users = Digest(), 0
        for chunk in finish(rows):
            digest = digest + digest_rows(chunk.select(spec.columns.names))
            num_users += len(run_lengths(chunk.column("user_id"))[0])
        return _Bucket(scratch, None, digest, num_users)

    def written(bucket: int, rows: Rows) -> _Bucket:
        local = scratch / f"{bucket}.parquet"
        header = {
            "kind": spec.kind,
            "table_id": table_id,
            "name": spec.name,
            "segment": window.segment,
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
        )
        try:
            for chunk in finish(rows):
                writer.write(chunk)
            stats = writer.close()
        except BaseException:
            with contextlib.suppress(OSError):  # what went wrong before matters more
                writer.abandon()
            raise
        path = f"segment={window.segment}/bucket={bucket}/{sha256_of(local)}.parquet"
        file = StagedFile(path, local.stat().st_size, bucket, writer.num_rows, stats)
        return _Bucket(local, file, writer.digest, writer.num_users)

    # Files go into place only when all are finished: rows may be refused up to the last one.
    done = map_buckets(digested if dry else written)
    files = []
    for bucket in done:
        if bucket.file is not None:
            storage.put(bucket.local, bucket.file.path)
            files.append(bucket.file)
    return files, Digest.sum(b.digest for b in done), sum(b.num_users for b in done)
