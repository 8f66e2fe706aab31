"""Fat rows in Parquet: each example with its own copy of its sequence, written and read in the ways
that are fastest for each layout.

What was tried to find these ways is in docs/benchmarks.md. Elements that are declared as never null
have half the levels to decode; plain pages decode faster than dictionaries, and repeat byte by byte, so
that compressors find one user's examples in each other.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.dlpack import from_dlpack

from benchmarks.loader_data import BATCH, TRAITS, Examples

__all__ = ["LAYOUTS", "READERS", "FatRows", "Layout", "tensors", "write"]

_COLUMNS = ["user_id", *TRAITS]


@dataclass(frozen=True)
class Layout:
    """How fat rows are written.

    Attributes:
        by_user: clustered by user, or in order of time.
        tuned: plain pages, elements never null.
        blobs: a sequence is one binary value, which nothing but its reader understands.
        rows: of a row group.
        page: bytes of a page at most: zstd finds repeats only within one.
    """

    compression: str
    by_user: bool = True
    tuned: bool = True
    blobs: bool = False
    level: int | None = None
    rows: int = BATCH
    page: int = 1 << 20

    @property
    def options(self) -> dict[str, Any]:
        return {
            "compression": self.compression,
            "compression_level": self.level,
            "use_dictionary": not self.tuned,
            "data_page_size": self.page,
            "write_statistics": not self.blobs,
        }


LAYOUTS = {
    "by time, snappy": Layout("snappy", by_user=False, tuned=False, rows=4 * BATCH),
    "by user, zstd": Layout("zstd", level=3, page=1 << 24),
    "by user, LZ4": Layout("lz4"),
    "by user, plain": Layout("none"),
    "blobs, plain": Layout("none", blobs=True),
    "blobs, zstd": Layout("zstd", blobs=True),
}


def write(examples: Examples, layout: Layout, path: Path) -> int:
    """Write all examples into one file; its size in bytes."""
    order = None if layout.by_user else examples.by_time
    writer = None
    for rows in examples.rows(order, layout.rows):
        table = _as_blobs(rows) if layout.blobs else rows
        if layout.tuned and not layout.blobs:
            table = _never_null(table)
        writer = writer or pq.ParquetWriter(path, table.schema, **layout.options)
        writer.write_table(table, row_group_size=layout.rows)
    assert writer is not None
    writer.close()
    return path.stat().st_size


def _never_null(rows: pa.Table) -> pa.Table:
    columns: dict[str, Any] = {}
    fields = []
    for field, column in zip(rows.schema, rows.columns, strict=True):
        values = column.combine_chunks()
        if pa.types.is_list(field.type):
            item = pa.field("element", field.type.value_type, nullable=False)
            values = pa.ListArray.from_arrays(values.offsets, values.values, type=pa.list_(item))
        columns[field.name] = values
        fields.append(pa.field(field.name, values.type, nullable=False))
    return pa.table(list(columns.values()), schema=pa.schema(fields))


def _as_blobs(rows: pa.Table) -> pa.Table:
    columns = {name: rows[name] for name in ("user_id", "request_time")}
    for name in TRAITS:
        lists = rows[name].combine_chunks()
        width = lists.values.type.bit_width // 8
        offsets = pa.array(lists.offsets.to_numpy().astype(np.int64) * width)
        buffers = [None, offsets.buffers()[1], lists.values.buffers()[1]]
        columns[name] = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(lists), buffers)
    return pa.table(columns)


# -- reading ---------------------------------------------------------------------------------

Rows: TypeAlias = pa.RecordBatch | pa.Table


def tensors(rows: Rows, newest: int | None = None) -> dict[str, torch.Tensor]:
    """Values and offsets of each trait, taken over from Arrow without a copy.

    Args:
        newest: only so many events of each row: a model with shorter sequences.
    """
    found: dict[str, torch.Tensor] = {}
    for name in TRAITS:
        column = rows.column(name)
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        if pa.types.is_large_binary(column.type):
            values, offsets = _from_blob(name, column)
        else:
            values = from_dlpack(column.flatten())
            offsets = np.asarray(column.offsets.to_numpy()) - column.offsets[0].as_py()
        if newest is not None:
            values, offsets = _newest(values, offsets, newest)
        found[name] = values
        found[f"{name}_offsets"] = torch.from_numpy(offsets)
    return found


def _from_blob(name: str, column: pa.Array) -> tuple[torch.Tensor, npt.NDArray[Any]]:
    offsets = np.frombuffer(column.buffers()[1], np.int64)[column.offset :][: len(column) + 1]
    raw = torch.frombuffer(column.buffers()[2], dtype=torch.uint8)[offsets[0] : offsets[-1]]
    kinds = {"category": torch.int32, "dwell_seconds": torch.float32}
    values = raw.view(kinds.get(name, torch.int64))
    return values, (offsets - offsets[0]) // values.element_size()


def _newest(
    values: torch.Tensor, offsets: npt.NDArray[Any], newest: int
) -> tuple[torch.Tensor, npt.NDArray[Any]]:
    lengths = np.minimum(np.diff(offsets), newest)
    ends = np.cumsum(lengths)
    places = np.repeat(offsets[1:] - ends, lengths) + np.arange(int(ends[-1]))
    return torch.from_numpy(values.numpy()[places]), np.append(0, ends)


def _in_threads_of_arrow(path: Path, newest: int | None) -> Iterator[int]:
    """Columns decoded side by side, by Arrow's own threads."""
    file = pq.ParquetFile(path, pre_buffer=False)
    for rows in file.iter_batches(BATCH, columns=_COLUMNS, use_threads=True):
        tensors(rows, newest)
        yield rows.num_rows


def _in_one_thread(path: Path, newest: int | None) -> Iterator[int]:
    file = pq.ParquetFile(path, pre_buffer=False)
    for rows in file.iter_batches(BATCH, columns=_COLUMNS, use_threads=False):
        tensors(rows, newest)
        yield rows.num_rows


def _row_groups_ahead(path: Path, newest: int | None) -> Iterator[int]:
    """Two threads, each with a row group of its own, some row groups ahead; a memory-mapped file."""
    metadata = pq.read_metadata(path)
    mine = threading.local()

    def read(group: int) -> list[int]:
        if not hasattr(mine, "file"):
            mine.file = pq.ParquetFile(path, metadata=metadata, memory_map=True, pre_buffer=False)
        table = mine.file.read_row_group(group, columns=_COLUMNS, use_threads=False)
        parts = [table.slice(at, BATCH) for at in range(0, table.num_rows, BATCH)]
        for part in parts:
            tensors(part, newest)
        return [part.num_rows for part in parts]

    with ThreadPoolExecutor(2) as pool:
        ahead: deque[Future[list[int]]] = deque()
        for group in range(metadata.num_row_groups):
            ahead.append(pool.submit(read, group))
            if len(ahead) == 4:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()


READERS: dict[str, Callable[[Path, int | None], Iterator[int]]] = {
    "Arrow's threads": _in_threads_of_arrow,
    "row groups ahead": _row_groups_ahead,
    "one thread": _in_one_thread,
}


class FatRows:
    """A written layout, read in the way that was fastest when all of them were tried once.

    Args:
        most: examples that are read at once at most, where an epoch takes too long.
    """

    def __init__(self, path: Path, *, newest: int | None = None, most: int | None = None) -> None:
        self._path = path
        self._newest = newest
        self._most = most
        rates = {way: self._rate(way) for way in READERS}
        self.way = max(rates, key=lambda way: rates[way])

    def examples_per_s(self) -> float:
        return self._rate(self.way)

    def _rate(self, way: str) -> float:
        start = time.perf_counter()
        seen = 0
        for rows in READERS[way](self._path, self._newest):
            seen += rows
            if self._most is not None and seen >= self._most:
                break
        return seen / (time.perf_counter() - start)
