"""Delimited text, streamed: blocks of whole lines, parsed by Arrow, whose bad rows can be found.

The good path never looks at single rows. Only when Arrow refuses a block, or a check fails, the
block is searched for the first bad line, so that the error can name it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NoReturn

import pyarrow as pa
import pyarrow.compute as pc

from vlm_dagster.errors import SourceFormatError
from vlm_dagster.events.delimited import Layout, empty, parse, refuse, shown, what_is_wrong
from vlm_dagster.events.files import ByteStream
from vlm_dagster.events.source import CheckedRows, OnCutLine, Progress
from vlm_dagster.schema import TIME_TYPE

__all__ = ["Rows", "Tally", "read_rows", "time_in_us"]

_BLOCK_BYTES = 4 << 20
_LONGEST_LINE = 64 << 20
_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000}
_END_OF_9999_S = 253_402_300_799
_CUT_WAY_OUT = (
    'Fetch the file again, or pass on_cut_line="drop" to leave this one line out (it is counted).'
)


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


def _parse_block(path: str, text: bytes, line: int, layout: Layout) -> Rows:
    if not text.strip(b"\r\n"):  # Arrow calls nothing but empty lines an empty file
        return Rows(path, empty(layout), text, line)
    try:
        return Rows(path, parse(text, layout), text, line)
    except pa.ArrowInvalid as error:
        refuse(path, text, line, layout, error)


def _last_line(
    path: str, text: bytes, line: int, layout: Layout, tally: Tally, on_cut_line: OnCutLine
) -> Rows | None:
    if not text.strip(b"\r"):
        return None
    try:
        rows = Rows(path, parse(text, layout), text, line)
        time = _as_integers(rows.batch.column(layout.time))[0].as_py()
        if tally.earliest is None or time is None or 2 * time >= tally.earliest:
            return rows
        reason = f"its {layout.time} {time} is far before every other one, so digits are missing"
    except pa.ArrowInvalid as error:
        reason = what_is_wrong(text, layout, error)[0]
    if on_cut_line == "drop":
        tally.num_dropped += 1
        return None
    raise SourceFormatError(
        path, f"the file ends in the middle of its last line (no line end, and {reason})",
        line=line, value=shown(text), way_out=_CUT_WAY_OUT,
    )  # fmt: skip


def _as_integers(times: pa.Array) -> pa.Array:
    return times.cast(pa.int64()) if pa.types.is_timestamp(times.type) else times


def _note_earliest(times: pa.Array, tally: Tally) -> None:
    earliest = pc.min(_as_integers(times)).as_py()
    if earliest is not None and (tally.earliest is None or earliest < tally.earliest):
        tally.earliest = int(earliest)


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
