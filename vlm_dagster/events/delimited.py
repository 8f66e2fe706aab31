"""The layout of delimited text, parsing it with Arrow, and what is wrong with a line it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.csv

from vlm_dagster.errors import SourceFormatError

__all__ = ["Layout", "empty", "parse", "refuse", "shown", "what_is_wrong"]

_UNIT_SEPARATOR = "\x1f"


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


def parse(text: bytes, layout: Layout, only: str | None = None) -> pa.RecordBatch:
    """Whole lines as columns (or one of them), or pa.ArrowInvalid."""
    delimiter = layout.delimiter
    if len(delimiter) > 1:  # Arrow splits at one character only
        text, delimiter = (
            text.replace(delimiter.encode(), _UNIT_SEPARATOR.encode()),
            _UNIT_SEPARATOR,
        )
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


def empty(layout: Layout) -> pa.RecordBatch:
    """What no lines at all are parsed into."""
    return pa.RecordBatch.from_pylist([], schema=pa.schema(list(layout.types.items())))


def refuse(path: str, text: bytes, line: int, layout: Layout, error: Exception) -> NoReturn:
    """Find the first line that Arrow refuses, by halving, and say what is wrong with it."""
    ends = np.flatnonzero(np.frombuffer(text, np.uint8) == 10) + 1
    good, bad = 0, len(ends)  # the first `good` lines parse, the first `bad` do not
    while bad - good > 1:
        middle = (good + bad) // 2
        try:
            parse(text[: ends[middle - 1]], layout)
            good = middle
        except pa.ArrowInvalid as found:
            if "Empty CSV file" in str(found):
                good = middle
            else:
                bad, error = middle, found
    one = text[ends[bad - 2] if bad > 1 else 0 : ends[bad - 1]].rstrip(b"\r\n")
    problem, value, way_out = what_is_wrong(one, layout, error)
    raise SourceFormatError(path, problem, line=line + bad - 1, value=value, way_out=way_out)


def what_is_wrong(text: bytes, layout: Layout, error: Exception) -> tuple[str, Any, str]:
    """Problem, value and way out of one bad line."""
    try:
        fields = text.decode().split(layout.delimiter)
    except UnicodeDecodeError as broken:
        return "not UTF-8 text", text[broken.start : broken.start + 8], "Convert the file to UTF-8."
    if len(fields) != len(layout.columns) and not (layout.quotes and '"' in text.decode()):
        return (
            f"the line has {len(fields)} fields, but {len(layout.columns)} are expected "
            f"({', '.join(layout.columns)})",
            shown(text),
            "Repair or remove the line, or check that this is the right format.",
        )
    for name, kind in layout.types.items():
        try:
            parse(text, layout, only=name)
        except pa.ArrowInvalid:
            at = layout.columns.index(name)
            value = fields[at] if len(fields) == len(layout.columns) else shown(text)
            return (
                f"column {name!r} is not {_spoken(kind)}",
                value,
                "Repair or remove the line, or check that this is the right format.",
            )
    return f"cannot be parsed ({error})", shown(text), "Repair or remove the line."


def _spoken(kind: pa.DataType) -> str:
    if pa.types.is_integer(kind):
        bits = kind.bit_width
        return f"a whole number of {bits} bits ({-(2 ** (bits - 1))} to {2 ** (bits - 1) - 1})"
    return "a number" if pa.types.is_floating(kind) else f"a {kind}"


def shown(text: bytes) -> str:
    """A line for an error message: not too long, whatever its bytes."""
    line = text.decode(errors="replace")
    return line if len(line) <= 160 else line[:160] + "..."
