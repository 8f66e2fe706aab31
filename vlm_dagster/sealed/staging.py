"""The first half of sealing: sorted rows become files in place, which nobody sees yet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlm_dagster.hashing import Digest
from vlm_dagster.sealed.spec import TableSpec
from vlm_dagster.sealed.writer import SegmentWriter, StagedFile, sha256_of
from vlm_dagster.storage import Storage
from vlm_dagster.windows import Window

__all__ = ["Correction", "StagedWindow", "whole_users", "write_window"]


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


def write_window(
    storage: Storage,
    spec: TableSpec,
    table_id: str,
    window: Window,
    rows: Iterator[pa.RecordBatch],
    scratch: Path,
    *,
    dry: bool,
) -> tuple[list[StagedFile], Digest, int]:
    """Cut sorted rows into one file a bucket, and put these in place.

    Args:
        rows: in the table's order, with `bucket`; all rows of a user come in one batch.
        scratch: a local folder.
        dry: only compute the digest; leave no file behind.

    Returns:
        The files, the digest of all rows, and the number of users.
    """
    # Files go into place only when all are finished: rows may be refused up to the last one.
    finished: list[tuple[Path, StagedFile]] = []
    digest = Digest()
    num_users = 0
    writer: SegmentWriter | None = None
    current = -1

    def close() -> None:
        nonlocal digest, num_users
        assert writer is not None
        stats = writer.close()
        digest = digest + writer.digest
        num_users += writer.num_users
        local = scratch / f"{current}.parquet"
        if dry:
            local.unlink()
            return
        path = f"segment={window.segment}/bucket={current}/{sha256_of(local)}.parquet"
        size = local.stat().st_size
        finished.append((local, StagedFile(path, size, current, writer.num_rows, stats)))

    try:
        for batch in rows:
            buckets = batch.column("bucket").to_numpy()
            edges = np.flatnonzero(np.diff(buckets)) + 1
            for start, end in zip([0, *edges], [*edges, len(buckets)], strict=True):
                if end == start:
                    continue  # a chunk whose rows were all dropped
                if buckets[start] != current:
                    if writer is not None:
                        close()
                    current = int(buckets[start])
                    header = {
                        "kind": spec.kind,
                        "table_id": table_id,
                        "name": spec.name,
                        "segment": window.segment,
                        "bucket": current,
                    }
                    writer = SegmentWriter(
                        scratch / f"{current}.parquet",
                        spec.columns,
                        header,
                        spec.sort_columns,
                        spec.extremes,
                        stripes=spec.stripes,
                        encodings=spec.encodings,
                    )
                assert writer is not None
                writer.write(batch.slice(start, end - start))
        if writer is not None:
            close()
    except BaseException:
        if writer is not None:
            with contextlib.suppress(OSError):  # what went wrong before matters more
                writer.abandon()
        raise
    for local, file in finished:
        storage.put(local, file.path)
    return [file for _, file in finished], digest, num_users


def whole_users(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Re-cut a sorted stream so that no user's rows are spread over two chunks."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        users = batch.column("user_id")
        last = users[-1]
        if held and held[-1].column("user_id")[-1] == last:
            held.append(batch)  # the whole batch is one user's, who goes on
            if users[0] != last:
                raise AssertionError("rows are not sorted by user")
            continue
        cut = int(pc.index(users, last).as_py())
        if held or cut:
            yield _joined([*held, batch.slice(0, cut)])
        held = [batch.slice(cut)]
    if held:
        yield _joined(held)


def _joined(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    if len(batches) == 1:
        return batches[0]
    return pa.concat_batches(batches)
