"""What users hand over, as a stream of batches with exactly the declared columns.

Accepts Arrow tables, batches, readers, iterables of batches, anything with the Arrow C stream
interface (Polars, pandas, DuckDB), and Parquet paths. Types may widen, never narrow.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import pyarrow.parquet as pq

from vlm_dagster.errors import InvalidEventsError, InvalidRequestsError, SchemaError

__all__ = ["Column", "Incoming", "Rows"]

Rows = Any
"""Arrow table, record batch, reader, iterable of batches, Arrow C stream, or Parquet path(s)."""

_BATCH_ROWS = 131_072
_PORTION_ROWS = 8 * _BATCH_ROWS
_BYTES_READ_AHEAD = 128 << 20
_UTC = {"UTC", "Etc/UTC", "+00:00", "Z", "GMT", "Etc/GMT"}
_INT_BITS = {pa.int8(): 8, pa.int16(): 16, pa.int32(): 32, pa.int64(): 64}
_UINT_BITS = {pa.uint8(): 8, pa.uint16(): 16, pa.uint32(): 32, pa.uint64(): 64}
_FLOAT_BITS = {pa.float16(): 16, pa.float32(): 32, pa.float64(): 64}
# The integers that a float holds exactly: those of fewer bits than its mantissa.
_MANTISSA_BITS = {pa.float32(): 24, pa.float64(): 53}


@dataclass(frozen=True)
class Column:
    """A declared column. `missing` is what a null becomes; None refuses nulls."""

    name: str
    type: pa.DataType
    missing: bool | int | float | str | None = None


@dataclass(frozen=True)
class Incoming:
    """The columns that an input must have, and how to name its rows in errors."""

    noun: str
    columns: tuple[Column, ...]
    extra_way_out: str
    error: type[InvalidEventsError] | type[InvalidRequestsError] = InvalidEventsError

    def batches(self, rows: Rows) -> Iterator[tuple[str, int, pa.RecordBatch]]:
        """Yields (where, number of the first row there, batch with exactly the columns)."""
        for where, offset, batch in _stream(rows, self.noun):
            if batch.num_rows or offset == 0:
                yield where, offset, self._conform(where, offset, batch)

    def _conform(self, where: str, offset: int, batch: pa.RecordBatch) -> pa.RecordBatch:
        names = batch.schema.names
        place = f" in {where}" if where else ""
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise SchemaError(f"column {twice[0]!r} stands twice{place}", "Drop one of them.")
        wanted = [column.name for column in self.columns]
        absent = [name for name in wanted if name not in names]
        if absent:
            raise SchemaError(
                f"column {absent[0]!r} is missing from the {self.noun}s{place}; they have "
                f"{', '.join(names) or 'no columns'}",
                f"The {self.noun}s need exactly {', '.join(wanted)}: add or rename it.",
            )
        extra = [name for name in names if name not in wanted]
        if extra:
            raise SchemaError(
                f"column {extra[0]!r} of the {self.noun}s{place} is not declared",
                self.extra_way_out.format(name=extra[0]),
            )
        arrays = [
            self._column(where, offset, column, batch.column(column.name))
            for column in self.columns
        ]
        return pa.record_batch(arrays, names=wanted)

    def _column(self, where: str, offset: int, column: Column, array: pa.Array) -> pa.Array:
        if pa.types.is_null(array.type):
            array = pa.nulls(len(array), column.type)
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        refuse_type(column, array.type, self.noun, where)
        if array.type != column.type:
            try:
                array = array.cast(column.type)
            except pa.ArrowInvalid:
                self._refuse_unfit_time(where, offset, column, array)
                raise
        if array.null_count:
            if column.missing is None:
                nulls = pc.is_null(array)
                self.refuse(
                    where,
                    offset,
                    nulls,
                    pa.nulls(len(array)),
                    column.name,
                    "is null",
                    "Fill it or drop the row"
                    + (
                        "."
                        if column.name in ("user_id", "event_id", "event_time", "available_at")
                        else ", or declare what it becomes with Trait(..., missing=VALUE)."
                    ),
                )
            array = array.fill_null(pa.scalar(column.missing, column.type))
        return array

    def _refuse_unfit_time(self, where: str, offset: int, column: Column, array: pa.Array) -> None:
        cut = array.cast(column.type, safe=False)
        unfit = pc.not_equal(cut.cast(array.type, safe=False), array)
        if array.type.unit == "ns":
            problem, way_out = "has more precision", "Round it to microseconds."
        else:
            problem, way_out = "lies further off", "Check its unit, or drop the row."
        self.refuse(
            where,
            offset,
            unfit,
            array.cast(pa.int64()),
            column.name,
            f"{problem} than {column.type} keeps",
            way_out,
        )

    def refuse(
        self,
        where: str,
        offset: int,
        bad: pa.Array,
        values: pa.Array,
        column: str,
        problem: str,
        way_out: str,
    ) -> None:
        """Raise for the first row where `bad` is true, if there is one."""
        first = pc.index(bad, True).as_py()
        if first < 0:
            return
        raise self.error(
            problem,
            row=offset + first,
            column=column,
            value=values[first].as_py(),
            way_out=way_out,
            where=where,
            num_rows=pc.sum(bad.cast(pa.int64())).as_py(),
        )


def refuse_type(column: Column, kind: pa.DataType, noun: str, where: str = "") -> None:
    """SchemaError unless every value of `kind` is one of the declared type."""
    if kind == column.type or widens(kind, column.type):
        return
    place = f" in {where}" if where else ""
    what = f"column {column.name!r} of the {noun}s{place} is {kind}, declared {column.type}"
    if pa.types.is_timestamp(column.type):
        if pa.types.is_timestamp(kind) and kind.tz is None:
            raise SchemaError(
                f"{what}: it has no time zone",
                "Say which instant it means, e.g. "
                "pc.assume_timezone(column, 'America/Sao_Paulo').cast(pa.timestamp('us', 'UTC')).",
            )
        if pa.types.is_timestamp(kind):
            raise SchemaError(
                f"{what}: times are kept in UTC", "Cast it: .cast(pa.timestamp('us', 'UTC'))."
            )
        raise SchemaError(
            what,
            "Numbers do not say their unit: convert them, e.g. "
            "pa.array(seconds).cast(pa.timestamp('s', 'UTC')).",
        )
    raise SchemaError(
        f"{what}: that may lose values",
        "Cast it yourself, where you know that nothing is lost, or declare the wider type.",
    )


def widens(kind: pa.DataType, target: pa.DataType) -> bool:
    """Whether every value of `kind` is exactly a value of `target` (nanoseconds: if they fit)."""
    if kind in _INT_BITS:
        bits = _INT_BITS[kind]
    elif kind in _UINT_BITS:
        bits = _UINT_BITS[kind] + 1
    else:
        bits = 0
    if target in _INT_BITS:
        return 0 < bits <= _INT_BITS[target]
    if target in _MANTISSA_BITS:
        if kind in _FLOAT_BITS:
            return _FLOAT_BITS[kind] <= _FLOAT_BITS[target]
        return 0 < bits <= _MANTISSA_BITS[target]
    if target == pa.string():
        return bool(pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
    if pa.types.is_timestamp(target):
        return bool(pa.types.is_timestamp(kind) and kind.tz in _UTC)
    return False


def _stream(rows: Rows, noun: str) -> Iterator[tuple[str, int, pa.RecordBatch]]:
    if isinstance(rows, (str, os.PathLike)):
        yield from _parquet(os.fspath(rows))
        return
    if isinstance(rows, pa.RecordBatch):
        rows = [rows]
    elif isinstance(rows, pa.Table):
        rows = rows.to_batches(max_chunksize=_BATCH_ROWS) or [_no_rows(rows.schema)]
    elif hasattr(rows, "__arrow_c_stream__"):
        rows = pa.RecordBatchReader.from_stream(rows)
        yield "", 0, _no_rows(rows.schema)  # its columns count, even if no batch comes
    if not isinstance(rows, Iterable):
        raise SchemaError(
            f"{noun}s of type {type(rows).__name__} cannot be read",
            "Give an Arrow table, an iterable of record batches, or Parquet paths.",
        )
    offset = 0
    for item in rows:
        if isinstance(item, (str, os.PathLike)):
            yield from _parquet(os.fspath(item))
            continue
        if isinstance(item, pa.Table):
            parts: Sequence[pa.RecordBatch] = item.to_batches(max_chunksize=_BATCH_ROWS)
        elif isinstance(item, pa.RecordBatch):
            parts = [item]
        else:
            raise SchemaError(
                f"an item of type {type(item).__name__} is among the {noun}s",
                "Give an iterable of Arrow record batches or of Parquet paths, not of rows.",
            )
        for part in parts:
            yield "", offset, part
            offset += part.num_rows


def _no_rows(schema: pa.Schema) -> pa.RecordBatch:
    return pa.record_batch([pa.array([], f.type) for f in schema], schema=schema)


def _portions(metadata: pq.FileMetaData) -> tuple[list[list[int]], int]:
    """Adjacent row groups of a file, some batches of rows together, and the bytes of the largest."""
    portions: list[list[int]] = []
    num_rows = num_bytes = largest = 0
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        if not portions or num_rows + group.num_rows > _PORTION_ROWS:
            portions.append([])
            num_rows = num_bytes = 0
        portions[-1].append(i)
        num_rows += group.num_rows
        num_bytes += group.total_byte_size
        largest = max(largest, num_bytes)
    return portions, largest


def _parquet(path: str) -> Iterator[tuple[str, int, pa.RecordBatch]]:
    filesystem, inner = (
        pyarrow.fs.FileSystem.from_uri(path)
        if "://" in path
        else (pyarrow.fs.LocalFileSystem(), path)
    )
    try:
        with filesystem.open_input_file(inner) as source:
            metadata = pq.read_metadata(source)
            portions, largest = _portions(metadata)
            # Read ahead, columns are decoded in parallel; but all that is asked for at once is held
            # until its last row is handed over. So a portion at a time, unless that is much.
            file = pq.ParquetFile(
                source, metadata=metadata, pre_buffer=largest <= _BYTES_READ_AHEAD
            )
            offset = 0
            if metadata.num_rows == 0:
                yield path, 0, _no_rows(file.schema_arrow)
            for groups in portions:
                for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups):
                    yield path, offset, batch
                    offset += batch.num_rows
    except FileNotFoundError:
        raise SchemaError(f"there is no file {path}", "Check the path.") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise SchemaError(
            f"{path} cannot be read as Parquet ({error})", "Check the file."
        ) from None
