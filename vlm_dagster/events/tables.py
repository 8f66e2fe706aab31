"""Parquet and CSV files with any columns, read through a `ColumnMapping`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from vlm_dagster.errors import SchemaError, SourceFormatError
from vlm_dagster.events.columns import ColumnMapping
from vlm_dagster.events.delimited import Layout
from vlm_dagster.events.files import ByteStream, InputPath, find_files, first_line, total_size
from vlm_dagster.events.lines import Rows, Tally, read_rows
from vlm_dagster.events.source import BinaryLabel, OnCutLine, Progress
from vlm_dagster.schema import FeatureGroup

__all__ = ["CsvSource", "ParquetSource"]

_BATCH_ROWS = 131_072
_GUESS_BYTES = 1 << 20
_NULLS = ("", "NULL", "null", "\\N")


def _check_label(label: BinaryLabel | None, group: FeatureGroup) -> BinaryLabel | None:
    if label is not None:
        group.trait(label.trait)
    return label


@dataclass(frozen=True)
class _ParquetRows:
    path: str
    batch: pa.RecordBatch
    first_row: int

    def refuse_where(self, bad: pa.Array, column: str, problem: str, way_out: str) -> None:
        row = pc.index(bad, True).as_py()
        if row >= 0:
            raise SourceFormatError(
                f"{self.path}, row {self.first_row + row} (from 0)", f"column {column!r} {problem}",
                line=None, value=self.batch.column(column)[row].as_py(), way_out=way_out,
            )  # fmt: skip


class ParquetSource:
    """The rows of one or several Parquet files with the same columns, in name order."""

    def __init__(
        self, path: InputPath, mapping: ColumnMapping, label: BinaryLabel | None = None
    ) -> None:
        self.paths = find_files(path, ["*.parquet"])
        self.num_bytes = total_size(self.paths)
        self.num_dropped = 0
        self._mapping = mapping
        with _open_parquet(self.paths[0]) as file:
            self.group, self._columns = mapping.resolve(self.paths[0], file.schema_arrow)
            for batch in file.iter_batches(batch_size=64, columns=list(self._columns.values())):
                mapping.check_unit(_ParquetRows(self.paths[0], batch, 0), self._columns)
                break
        self.label = _check_label(label, self.group)

    def options(self) -> dict[str, Any]:
        return {"format": "parquet", "mapping": self._mapping.to_json()}

    def batches(self, progress: Progress | None = None) -> Iterator[pa.RecordBatch]:
        before = 0
        for path in self.paths:
            size = total_size([path])
            with _open_parquet(path) as file:
                self._check_same(path, file.schema_arrow)
                num_rows, at = file.metadata.num_rows, 0
                try:
                    for batch in file.iter_batches(
                        batch_size=_BATCH_ROWS, columns=list(self._columns.values())
                    ):
                        rows = _ParquetRows(path, batch, at)
                        self._mapping.check_unit(rows, self._columns)
                        yield self._mapping.convert(rows, self.group, self._columns)
                        at += batch.num_rows
                        if progress is not None:
                            progress(before + size * at // num_rows)
                except (pa.ArrowInvalid, OSError) as error:
                    if isinstance(error, SourceFormatError):
                        raise
                    raise _damaged(path, error) from None
            before += size

    def _check_same(self, path: str, schema: pa.Schema) -> None:
        group, columns = self._mapping.resolve(path, schema)
        if group != self.group or columns != self._columns:
            raise SourceFormatError(
                path, f"has other columns or types than {self.paths[0]}: "
                f"{_spoken(group)} instead of {_spoken(self.group)}",
                line=None, value=None,
                way_out="Read files of different kinds as different feature groups, or list the "
                "traits and types that they share.",
            )  # fmt: skip


def _spoken(group: FeatureGroup) -> str:
    return ", ".join(
        [f"user_id {group.user_id}", f"event_id {group.event_id}"]
        + [f"{trait.name} {trait.type}" for trait in group.traits]
    )


def _damaged(path: str, error: Exception) -> SourceFormatError:
    return SourceFormatError(
        path, f"is not a whole Parquet file ({error})", line=None, value=None,
        way_out="Fetch or write it again.",
    )  # fmt: skip


def _open_parquet(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(path, error) from None


class CsvSource:
    """The rows of one or several CSV files with a header, in name order.

    Types are guessed from the first MiB of the first file, then hold for all of them: a later
    value that does not fit is an error that names its line, never a silent change of type. An
    empty field, `NULL` and `\\N` are nulls.
    """

    def __init__(
        self,
        path: InputPath,
        mapping: ColumnMapping,
        label: BinaryLabel | None = None,
        delimiter: str = ",",
        on_cut_line: OnCutLine = "refuse",
    ) -> None:
        if len(delimiter) != 1 or delimiter in '"\r\n':
            raise SchemaError(f"delimiter={delimiter!r} is not one character", "Use ',' or '\\t'.")
        self.paths = find_files(path, ["*.csv", "*.tsv"])
        self.num_bytes = total_size(self.paths)
        self.num_dropped = 0
        self._mapping = mapping
        self._delimiter = delimiter
        self._on_cut_line = on_cut_line
        guess = self._guess(self.paths[0])
        self.group, self._columns = mapping.resolve(self.paths[0], guess.schema)
        self._names = tuple(guess.schema.names)
        used = list(self._columns.values())
        self._types = {
            name: _parsed_as(guess.schema.field(name).type) for name in self._names if name in used
        }
        for ours, kind in mapping.types:
            if ours in self._columns and not pa.types.is_timestamp(kind):
                self._types[self._columns[ours]] = kind
        mapping.check_unit(Rows(self.paths[0], guess, b"", 2), self._columns)
        self.label = _check_label(label, self.group)

    def options(self) -> dict[str, Any]:
        return {
            "format": "csv",
            "mapping": self._mapping.to_json(),
            "delimiter": self._delimiter,
            "on_cut_line": self._on_cut_line,
        }

    def batches(self, progress: Progress | None = None) -> Iterator[pa.RecordBatch]:
        tally = Tally(progress=progress)
        layout = Layout(
            self._delimiter,
            self._names,
            self._types,
            time=self._columns["event_time"],
            header=True,
            quotes=True,
            nulls=_NULLS,
        )
        for path in self.paths:
            if (names := _header(path, self._delimiter)) != self._names:
                raise SourceFormatError(
                    path, f"has other columns than {self.paths[0]}", line=1,
                    value=self._delimiter.join(names)[:160],
                    way_out="Read files of different kinds as different feature groups.",
                )  # fmt: skip
            for rows in read_rows(path, layout, tally, self._on_cut_line):
                yield self._mapping.convert(rows, self.group, self._columns)
        self.num_dropped = tally.num_dropped

    def _guess(self, path: str) -> pa.RecordBatch:
        """The first rows, as Arrow would type them."""
        names = _header(path, self._delimiter)
        with ByteStream(path) as stream:
            text = stream.read(_GUESS_BYTES, line=1).removeprefix(b"\xef\xbb\xbf")
            last = text if len(text) < _GUESS_BYTES else text[: text.rfind(b"\n") + 1]
        body = last[last.find(b"\n") + 1 :] if b"\n" in last else b""
        if not body.strip(b"\r\n"):
            raise SourceFormatError(
                path, "holds a header but no rows", line=1, value=self._delimiter.join(names)[:160],
                way_out="Give a file with rows first: the types of the columns are taken from it.",
            )  # fmt: skip
        kinds = dict(self._mapping.types)
        given = {
            column: kinds[ours]
            for ours, column in ({n: n for n in names} | dict(self._mapping.names)).items()
            if ours in kinds and not pa.types.is_timestamp(kinds[ours])
        }
        convert = pa.csv.ConvertOptions(
            null_values=list(_NULLS), strings_can_be_null=True, column_types=given
        )
        parse = pa.csv.ParseOptions(
            delimiter=self._delimiter, invalid_row_handler=lambda _row: "skip"
        )  # a bad row is found, and named, when it is read
        try:
            table = pa.csv.read_csv(
                pa.BufferReader(body),
                read_options=pa.csv.ReadOptions(column_names=list(names)),
                parse_options=parse,
                convert_options=convert,
            )
        except pa.ArrowInvalid as error:
            raise SourceFormatError(
                path, f"cannot be parsed ({error})", line=None, value=None,
                way_out="Check the delimiter, the declared types and the encoding (UTF-8).",
            ) from None  # fmt: skip
        batches = table.combine_chunks().to_batches()
        if not batches:
            raise SourceFormatError(
                path, f"no row has the {len(names)} fields of the header", line=2,
                value=body[: body.find(b"\n")].decode(errors="replace")[:160],
                way_out="Check the delimiter.",
            )  # fmt: skip
        return batches[0]


def _header(path: str, delimiter: str) -> tuple[str, ...]:
    line = first_line(path)
    return tuple(name.strip().strip('"') for name in line.split(delimiter))


def _parsed_as(kind: pa.DataType) -> pa.DataType:
    # The guess has the precision of the first rows; later ones may be finer.
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", "UTC" if kind.tz is not None else None)
    return kind
