"""Delimited text, streamed: blocks of whole lines, parsed by Arrow, whose bad rows can be found.

The good path never looks at single rows. Only when Arrow refuses a block, or a check fails, the
block is searched for the first bad line, so that the error can name it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from vlm_dagster.errors import SourceFormatError
from vlm_dagster.events.files import ByteStream
from vlm_dagster.events.source import CheckedRows, OnCutLine, Progress
from vlm_dagster.schema import TIME_TYPE

__all__ = ["Layout", "Rows", "Tally", "read_rows", "time_in_us"]

_BLOCK_BYTES = 4 << 20
_LONGEST_LINE = 64 << 20
_UNIT_SEPARATOR = "\x1f"
_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000}
_END_OF_9999_S = 253_402_300_799
_CUT_WAY_OUT = (
    'Fetch the file again, or pass on_cut_line="drop" to leave this one line out (it is counted).'
)


@dataclass(frozen=True)
class Layout:
    """How the lines of a file are made.

    Attributes:
        delimiter: one character, or "::".
        columns: names in file order.
        types: the columns to read, and as what.
        time: the column of types that holds the time of the event.
        header: whether line 1 names the columns.
        quotes: whether fields may stand in double quotes (line breaks inside are not supported).
        nulls: texts that stand for a missing value. None: an empty field is an error.
    """

    delimiter: str
    columns: tuple[str, ...]
    types: dict[str, pa.DataType]
    time: str
    header: bool = False
    quotes: bool = False
    nulls: tuple[str, ...] | None = None


@dataclass
class Tally:
    """What a pass over the files has seen so far. Times are in the unit of the file."""

    num_bytes: int = 0
    num_rows: int = 0
    num_dropped: int = 0
    earliest: int | None = None
    progress: Progress | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Rows:
    """The parsed rows of one block of lines."""

    path: str
    batch: pa.RecordBatch
    text: bytes
    first_line: int

    def refuse_where(self, bad: pa.Array, column: str, problem: str, way_out: str) -> None:
        """SourceFormatError for the first row where `bad` is true, if there is one."""
        row = pc.index(bad, True).as_py()
        if row >= 0:
            self.fail(row, column, problem, way_out)

    def fail(self, row: int, column: str, problem: str, way_out: str) -> NoReturn:
        """SourceFormatError for this row of `batch`."""
        raise SourceFormatError(
            self.path,
            f"column {column!r} {problem}",
            line=self._line_of(row),
            value=self.batch.column(column)[row].as_py(),
            way_out=way_out,
        )

    def _line_of(self, row: int) -> int:
        # Arrow skips empty lines, so rows and lines are counted apart.
        for number, line in enumerate(self.text.split(b"\n"), self.first_line):
            if line.rstrip(b"\r"):
                if row == 0:
                    return number
                row -= 1
        raise AssertionError("a row beyond the block's lines")


def read_rows(
    path: str, layout: Layout, tally: Tally, on_cut_line: OnCutLine = "refuse"
) -> Iterator[Rows]:
    """The rows of one file, block by block.

    A last line without a line end is taken only if it can be trusted: it must parse, and its time
    must not be less than half the earliest time before it. A time that lost its last digit is a
    tenth of itself, which is years before everything else; so a line cut inside or before its
    time is always found. A line cut behind its time, in a last field that still parses, cannot be.

    Raises:
        SourceFormatError: names the line and the value.
    """
    before = tally.num_bytes
    with ByteStream(path) as stream:
        for line, text, whole in _blocks(stream):
            if layout.header and line == 1:
                text = text[text.find(b"\n") + 1 :] if whole else b""
                line = 2
            rows: Rows | None
            if whole:
                rows = _parse_block(path, text, line, layout)
            else:
                rows = _last_line(path, text, line, layout, tally, on_cut_line)
            if rows is not None and rows.batch.num_rows:
                _note_earliest(rows.batch.column(layout.time), tally)
                tally.num_rows += rows.batch.num_rows
                yield rows
            tally.num_bytes = before + stream.num_read
            if tally.progress is not None:
                tally.progress(tally.num_bytes)


def _blocks(stream: ByteStream) -> Iterator[tuple[int, bytes, bool]]:
    """Runs of whole lines with the number of their first line, and at last, marked False, what
    follows the last line end, if anything."""
    line = 1
    rest = stream.read(_BLOCK_BYTES, line).removeprefix(b"\xef\xbb\xbf")
    while True:
        end = rest.rfind(b"\n") + 1
        if end:
            text, rest = rest[:end], rest[end:]
            yield line, text, True
            line += text.count(b"\n")
        elif len(rest) > _LONGEST_LINE:
            raise SourceFormatError(
                stream.path, f"a line does not end within {_LONGEST_LINE >> 20} MiB",
                line=line, value=None,
                way_out="This does not look like a text file of rows.",
            )  # fmt: skip
        chunk = stream.read(_BLOCK_BYTES, line)
        if not chunk:
            break
        rest += chunk
    if rest:
        yield line, rest, False


def _parse(text: bytes, layout: Layout, only: str | None = None) -> pa.RecordBatch:
    delimiter = layout.delimiter
    if len(delimiter) > 1:  # Arrow splits at one character only
        text, delimiter = text.replace(delimiter.encode(), b"\x1f"), _UNIT_SEPARATOR
    table = pa.csv.read_csv(
        pa.BufferReader(text),
        read_options=pa.csv.ReadOptions(column_names=list(layout.columns)),
        parse_options=pa.csv.ParseOptions(
            delimiter=delimiter, quote_char='"' if layout.quotes else False
        ),
        convert_options=pa.csv.ConvertOptions(
            column_types=layout.types,
            include_columns=list(layout.types) if only is None else [only],
            null_values=list(layout.nulls or ()),
            strings_can_be_null=layout.nulls is not None,
        ),
    )
    return (
        table.combine_chunks().to_batches(max_chunksize=None)[0]
        if table.num_rows
        else (pa.RecordBatch.from_pylist([], schema=table.schema))
    )


def _parse_block(path: str, text: bytes, line: int, layout: Layout) -> Rows:
    if not text.strip(b"\r\n"):  # Arrow calls nothing but empty lines an empty file
        return Rows(path, _empty(layout), text, line)
    try:
        return Rows(path, _parse(text, layout), text, line)
    except pa.ArrowInvalid as error:
        _refuse(path, text, line, layout, error)


def _empty(layout: Layout) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([], schema=pa.schema(list(layout.types.items())))


def _last_line(
    path: str, text: bytes, line: int, layout: Layout, tally: Tally, on_cut_line: OnCutLine
) -> Rows | None:
    if not text.strip(b"\r"):
        return None
    try:
        rows = Rows(path, _parse(text, layout), text, line)
        time = _as_integers(rows.batch.column(layout.time))[0].as_py()
        if tally.earliest is None or time is None or 2 * time >= tally.earliest:
            return rows
        reason = f"its {layout.time} {time} is far before every other one, so digits are missing"
    except pa.ArrowInvalid as error:
        reason = _what_is_wrong(text, layout, error)[0]
    if on_cut_line == "drop":
        tally.num_dropped += 1
        return None
    raise SourceFormatError(
        path, f"the file ends in the middle of its last line (no line end, and {reason})",
        line=line, value=_shown(text), way_out=_CUT_WAY_OUT,
    )  # fmt: skip


def _as_integers(times: pa.Array) -> pa.Array:
    return times.cast(pa.int64()) if pa.types.is_timestamp(times.type) else times


def _note_earliest(times: pa.Array, tally: Tally) -> None:
    earliest = pc.min(_as_integers(times)).as_py()
    if earliest is not None and (tally.earliest is None or earliest < tally.earliest):
        tally.earliest = int(earliest)


def _refuse(path: str, text: bytes, line: int, layout: Layout, error: Exception) -> NoReturn:
    """Find the first line that Arrow refuses, by halving, and say what is wrong with it."""
    ends = np.flatnonzero(np.frombuffer(text, np.uint8) == 10) + 1
    good, bad = 0, len(ends)  # the first `good` lines parse, the first `bad` do not
    while bad - good > 1:
        middle = (good + bad) // 2
        try:
            _parse(text[: ends[middle - 1]], layout)
            good = middle
        except pa.ArrowInvalid as found:
            if "Empty CSV file" in str(found):
                good = middle
            else:
                bad, error = middle, found
    one = text[ends[bad - 2] if bad > 1 else 0 : ends[bad - 1]].rstrip(b"\r\n")
    problem, value, way_out = _what_is_wrong(one, layout, error)
    raise SourceFormatError(path, problem, line=line + bad - 1, value=value, way_out=way_out)


def _what_is_wrong(text: bytes, layout: Layout, error: Exception) -> tuple[str, Any, str]:
    """Problem, value and way out of one bad line."""
    try:
        fields = text.decode().split(layout.delimiter)
    except UnicodeDecodeError as broken:
        return "not UTF-8 text", text[broken.start : broken.start + 8], "Convert the file to UTF-8."
    if len(fields) != len(layout.columns) and not (layout.quotes and '"' in text.decode()):
        return (
            f"the line has {len(fields)} fields, but {len(layout.columns)} are expected "
            f"({', '.join(layout.columns)})",
            _shown(text),
            "Repair or remove the line, or check that this is the right format.",
        )
    for name, kind in layout.types.items():
        try:
            _parse(text, layout, only=name)
        except pa.ArrowInvalid:
            at = layout.columns.index(name)
            value = fields[at] if len(fields) == len(layout.columns) else _shown(text)
            return (
                f"column {name!r} is not {_spoken(kind)}",
                value,
                "Repair or remove the line, or check that this is the right format.",
            )
    return f"cannot be parsed ({error})", _shown(text), "Repair or remove the line."


def _spoken(kind: pa.DataType) -> str:
    if pa.types.is_integer(kind):
        bits = kind.bit_width
        return f"a whole number of {bits} bits ({-(2 ** (bits - 1))} to {2 ** (bits - 1) - 1})"
    return "a number" if pa.types.is_floating(kind) else f"a {kind}"


def _shown(text: bytes) -> str:
    shown = text.decode(errors="replace")
    return shown if len(shown) <= 160 else shown[:160] + "..."


def time_in_us(rows: CheckedRows, column: str, unit: str) -> pa.Array:
    """A column that counts `s`, `ms` or `us` since 1970 as UTC timestamps in microseconds; nulls
    stay null, fractions are rounded to the microsecond.

    Raises:
        SourceFormatError: a time is negative, or after the year 9999 (a finer unit, read wrongly).
    """
    times = rows.batch.column(column)
    if pa.types.is_floating(times.type):
        rows.refuse_where(
            pc.invert(pc.is_finite(times)), column, "is not a time", "Repair or remove the row."
        )
    rows.refuse_where(
        pc.less(times, 0), column, "is a negative time", "Times before 1970 are not supported."
    )
    rows.refuse_where(
        pc.greater(times, _END_OF_9999_S * _PER_SECOND[unit]),
        column,
        f"lies after the year 9999 if it counts {unit}",
        "The file probably counts in a finer unit: convert it, or read it with the right one.",
    )
    in_us = pc.multiply(times, 1_000_000 // _PER_SECOND[unit])
    if pa.types.is_floating(times.type):
        in_us = pc.round(in_us)
    return in_us.cast(pa.int64()).cast(TIME_TYPE)
