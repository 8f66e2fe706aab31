"""Rows put by bucket as they come: some wait in memory, the rest in one file a partition.

A partition is a run of adjacent buckets: one, unless there are more than files to keep open. One that
is too large to be sorted in memory is split further, by ranges of users.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["MAX_PARTITIONS", "Partition", "Partitions"]

MAX_PARTITIONS = 64
_SAMPLED_ROWS = 65_536


@contextlib.contextmanager
def _spilling() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"sorting failed: {error}") from error


class Partition:
    """The rows of a run of buckets, in the order in which they came.

    Attributes:
        bucket: the only one, whose rows are kept without the column `bucket`; None if there may
            be several.
        num_rows, num_bytes: of all rows, as they lie in memory.
    """

    def __init__(self, path: Path, bucket: int | None) -> None:
        self._path = path
        self._held: list[pa.RecordBatch] = []
        # The file is held here, as a writer closes no sink that it opened by itself.
        self._sink: Any = None
        self._writer: pa.ipc.RecordBatchStreamWriter | None = None
        self.bucket = bucket
        self.num_rows = 0
        self.num_bytes = 0

    def add(self, batch: pa.RecordBatch, num_bytes: int, *, hold: bool) -> None:
        self.num_rows += batch.num_rows
        self.num_bytes += num_bytes
        if hold:
            self._held.append(batch)
            return
        if self._writer is None:
            self._sink = pa.OSFile(str(self._path), "wb")
            self._writer = pa.ipc.new_stream(self._sink, batch.schema)
        self._writer.write_batch(batch)

    def finish(self) -> None:
        """All rows have come."""
        if self._sink is not None and not self._sink.closed:
            assert self._writer is not None
            with self._sink:
                self._writer.close()

    def take(self) -> Iterator[pa.RecordBatch]:
        """The rows, which are forgotten then. Those of the file are mapped into memory."""
        return self._taken(pa.memory_map)

    def stream(self) -> Iterator[pa.RecordBatch]:
        """The same, one batch in memory at a time."""
        return self._taken(pa.OSFile)

    def _taken(self, opened: Callable[[str], Any]) -> Iterator[pa.RecordBatch]:
        held = self._held[::-1]
        self._held = []
        while held:
            yield held.pop()
        if self._writer is not None:
            with _spilling(), opened(str(self._path)) as source:
                yield from pa.ipc.open_stream(source)
            self._path.unlink()

    def split(self, column: str, num: int) -> list[Partition]:
        """As ranges of the values of a column, ascending, of about equal numbers of rows; rows with
        one value stay together. Fewer than `num` where there are not as many values. The rows are
        in the parts then.
        """
        step = max(self.num_rows // _SAMPLED_ROWS, 1)
        sample = pa.chunked_array([batch.column(column)[::step] for batch in self._peek()])
        sample = sample.take(pc.sort_indices(sample)).combine_chunks()
        edges = sample.take(pa.array(np.arange(1, num) * len(sample) // num)).unique()
        parts = [
            Partition(self._path.with_suffix(f".{i}.arrow"), self.bucket)
            for i in range(len(edges) + 1)
        ]
        row_bytes = max(self.num_bytes // self.num_rows, 1)
        try:
            for batch in self.stream():
                which = np.zeros(batch.num_rows, np.uint8)
                for edge in edges:
                    above = pc.greater_equal(batch.column(column), edge)
                    which += above.to_numpy(zero_copy_only=False)
                _put(parts, batch, which, row_bytes, hold=False)
        finally:
            with contextlib.ExitStack() as stack:  # all of them, even if one cannot be finished
                for part in parts:
                    stack.callback(part.finish)
        return [part for part in parts if part.num_rows]

    def _peek(self) -> Iterator[pa.RecordBatch]:
        yield from self._held
        if self._writer is not None:
            with _spilling(), pa.memory_map(str(self._path)) as source:
                yield from pa.ipc.open_stream(source)


class Partitions:
    """Where rows go by their column `bucket`.

    Args:
        limit: bytes of rows to hold in memory; what comes after these goes to files in `scratch`.
    """

    def __init__(self, scratch: Path, num_buckets: int, limit: int) -> None:
        self._num_buckets = num_buckets
        self._num = min(num_buckets, MAX_PARTITIONS)
        self._alone = self._num == num_buckets
        self._limit = limit
        self._parts = [
            Partition(scratch / f"part-{i}.arrow", i if self._alone else None)
            for i in range(self._num)
        ]
        self._num_held = 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Raises OSError: the disk failed, or is full."""
        if not batch.num_rows:
            return
        buckets = batch.column("bucket").to_numpy().astype(np.int64)
        which = (buckets * self._num // self._num_buckets).astype(np.uint8)
        if self._alone:
            batch = batch.drop_columns(["bucket"])
        row_bytes = max(batch.nbytes // batch.num_rows, 1)
        hold = self._num_held + row_bytes * batch.num_rows <= self._limit
        self._num_held += row_bytes * batch.num_rows if hold else 0
        _put(self._parts, batch, which, row_bytes, hold=hold)

    def finish(self) -> list[Partition]:
        """All rows have come: the partitions that have some, in ascending order of bucket."""
        with _spilling():
            for part in self._parts:
                part.finish()
        return [part for part in self._parts if part.num_rows]

    def close(self) -> None:
        """Close the files, which will be thrown away."""
        for part in self._parts:
            with contextlib.suppress(OSError):  # what went wrong before matters more
                part.finish()


def _put(
    parts: Sequence[Partition],
    batch: pa.RecordBatch,
    which: npt.NDArray[np.uint8],
    row_bytes: int,
    *,
    hold: bool,
) -> None:
    """Add every row to the part whose number `which` says, [N]."""
    counts = np.bincount(which, minlength=len(parts))
    # A stable sort of so few distinct values is a radix sort.
    rows = pa.array(np.argsort(which, kind="stable"))
    ordered = pa.RecordBatch.from_arrays(
        [pc.take(column, rows, boundscheck=False) for column in batch.columns], schema=batch.schema
    )
    begin = 0
    with _spilling():
        for i in np.flatnonzero(counts).tolist():
            num_rows = int(counts[i])
            parts[i].add(ordered.slice(begin, num_rows), num_rows * row_bytes, hold=hold)
            begin += num_rows
