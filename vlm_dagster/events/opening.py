"""One way in to every format."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import pyarrow as pa

from vlm_dagster.errors import SchemaError
from vlm_dagster.events.columns import ColumnMapping, TimeUnit
from vlm_dagster.events.files import InputPath
from vlm_dagster.events.generate import open_generated
from vlm_dagster.events.globo import GloboSource
from vlm_dagster.events.movielens import MovieLensSource
from vlm_dagster.events.source import BinaryLabel, EventSource, OnCutLine
from vlm_dagster.events.tables import CsvSource, ParquetSource
from vlm_dagster.events.taobao import TaobaoSource

__all__ = ["SourceFormat", "open_source"]

SourceFormat = Literal["movielens", "globo", "taobao", "parquet", "csv", "generated"]


def open_source(
    path: InputPath,
    format: SourceFormat,  # noqa: A002  (the word that users look for)
    *,
    mapping: Mapping[str, str] | None = None,
    traits: Sequence[str] | None = None,
    types: Mapping[str, pa.DataType] | None = None,
    time_unit: TimeUnit | None = None,
    assume_utc: bool = False,
    group: str | None = None,
    duplicates: Literal["refuse", "first"] | None = None,
    label: BinaryLabel | None = None,
    delimiter: str | None = None,
    on_cut_line: OnCutLine = "refuse",
) -> EventSource:
    """Open files of events. Compressed text (gzip, bz2, zstd, lz4) is recognised by its content.

    Args:
        path: a file, a folder, or a list of them; files are read in name order. For "generated",
            the folder that `vlm_dagster.events.generate.write` made.
        format: what the files are.
        mapping: for parquet and csv, from our names to the file's columns, e.g.
            `{"user_id": "uid", "event_time": "ts"}`; see `ColumnMapping`, also for `traits`,
            `types`, `time_unit`, `assume_utc`, `group` and `duplicates`.
        label: for parquet and csv, how a binary label follows from a trait.
        delimiter: for csv, one character; a comma unless given.
        on_cut_line: for text, what to do with a last line that ends in the middle.

    Raises:
        SourceFormatError: the input is missing, or its beginning does not fit the format. What
            lies further in is checked while reading.
        SchemaError: an option does not fit.
    """
    if format not in get_args(SourceFormat):
        raise SchemaError(
            f"format={format!r} is unknown", f"Use one of {', '.join(get_args(SourceFormat))}."
        )
    if on_cut_line not in get_args(OnCutLine):
        raise SchemaError(f"on_cut_line={on_cut_line!r} is unknown", "Use 'refuse' or 'drop'.")
    for_tables = {
        "mapping": mapping, "traits": traits, "types": types, "time_unit": time_unit,
        "assume_utc": assume_utc or None, "group": group, "duplicates": duplicates, "label": label,
    }  # fmt: skip
    given = [name for name, value in for_tables.items() if value is not None]
    if given and format not in ("parquet", "csv"):
        raise SchemaError(
            f"{given[0]} has no meaning for format {format!r}, whose columns are known",
            "Leave it out, or read the file as csv or parquet.",
        )
    if delimiter is not None and format != "csv":
        raise SchemaError(f"delimiter has no meaning for format {format!r}", "Leave it out.")
    columns = ColumnMapping(
        mapping, traits=traits, types=types, time_unit=time_unit, assume_utc=assume_utc,
        group=group or "events", duplicates=duplicates,
    )  # fmt: skip
    if format == "movielens":
        return MovieLensSource(path, on_cut_line)
    if format == "globo":
        return GloboSource(path, on_cut_line)
    if format == "taobao":
        return TaobaoSource(path, on_cut_line)
    if format == "parquet":
        return ParquetSource(path, columns, label)
    if format == "csv":
        return CsvSource(path, columns, label, delimiter or ",", on_cut_line)
    if not isinstance(path, str | os.PathLike):
        raise SchemaError("a generated data set is one folder", "Give its path alone.")
    return open_generated(path)
