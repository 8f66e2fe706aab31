"""Globo.com news clicks: a folder of hourly files `clicks_hour_*.csv`, or some of these files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from vlm_dagster.errors import SourceFormatError
from vlm_dagster.events.delimited import Layout
from vlm_dagster.events.files import InputPath, find_files, first_line, total_size
from vlm_dagster.events.lines import Tally, read_rows, time_in_us
from vlm_dagster.events.source import BinaryLabel, OnCutLine, Progress, content_ids, input_schema
from vlm_dagster.schema import FeatureGroup, Trait

__all__ = ["GloboSource"]

# The widths hold every code of the published data (the widest is 28) with room to spare; another
# code is refused by its line, never wrapped.
_TRAITS = {
    "click_article_id": Trait("item_id", pa.int64()),
    "session_id": Trait("session_id", pa.int64()),
    "click_environment": Trait("environment", pa.int8()),
    "click_deviceGroup": Trait("device_group", pa.int8()),
    "click_os": Trait("os", pa.int8()),
    "click_country": Trait("country", pa.int8()),
    "click_region": Trait("region", pa.int8()),
    "click_referrer_type": Trait("referrer_type", pa.int8()),
}
_TYPES = {
    "user_id": pa.int64(),
    "click_timestamp": pa.int64(),
    **{column: trait.type for column, trait in _TRAITS.items()},
}


class GloboSource:
    """The clicks of one or many hourly files, read in name order.

    The group is "clicks" with traits `item_id` and `session_id` (int64) and six context codes
    (int8). A file holds the sessions that began in its hour, so its clicks run on into later
    hours. An hour without clicks has a header only, which is fine. The event id is a hash of
    the whole row (without the session's start and size); of exact repeats the store keeps the
    first. There is no label.
    """

    group = FeatureGroup("clicks", list(_TRAITS.values()), duplicates="first")
    label: BinaryLabel | None = None

    def __init__(self, path: InputPath, on_cut_line: OnCutLine = "refuse") -> None:
        self.paths = find_files(path, ["clicks_hour_*.csv"])
        self.num_bytes = total_size(self.paths)
        self.num_dropped = 0
        self._on_cut_line = on_cut_line

    def options(self) -> dict[str, Any]:
        return {"format": "globo", "on_cut_line": self._on_cut_line}

    def batches(self, progress: Progress | None = None) -> Iterator[pa.RecordBatch]:
        schema = input_schema(self.group)
        tally = Tally(progress=progress)
        for path in self.paths:
            for rows in read_rows(path, _layout(path), tally, self._on_cut_line):
                times = time_in_us(rows, "click_timestamp", "ms")
                user = rows.batch.column("user_id")
                traits = [rows.batch.column(column) for column in _TRAITS]
                ids = content_ids([user, times, *traits])
                yield pa.record_batch([user, ids, times, *traits], schema=schema)
        self.num_dropped = tally.num_dropped


def _layout(path: str) -> Layout:
    line = first_line(path)
    names = tuple(name.strip().strip('"') for name in line.split(","))
    missing = [name for name in _TYPES if name not in names]
    if missing:
        raise SourceFormatError(
            path, f"the header lacks {', '.join(missing)}", line=1, value=line[:160],
            way_out="Give the hourly click files of the data set, with their header line.",
        )  # fmt: skip
    return Layout(",", names, _TYPES, time="click_timestamp", header=True)
