"""Taobao UserBehavior: `user_id,item_id,category_id,behavior,timestamp`, no header."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vlm_dagster.errors import SourceFormatError
from vlm_dagster.events.delimited import Layout
from vlm_dagster.events.files import InputPath, find_files, first_line, total_size
from vlm_dagster.events.lines import Tally, read_rows, time_in_us
from vlm_dagster.events.source import BinaryLabel, OnCutLine, Progress, content_ids, input_schema
from vlm_dagster.schema import FeatureGroup, Trait

__all__ = ["TAOBAO_ACTIONS", "TaobaoSource"]

TAOBAO_ACTIONS = {"pv": 0, "fav": 1, "cart": 2, "buy": 3}
"""The codes of trait `action`: page view, favourite, into the cart, purchase."""

_TYPES = {
    "user_id": pa.int64(),
    "item_id": pa.int64(),
    "category_id": pa.int64(),
    "behavior": pa.string(),
    "timestamp": pa.int64(),
}
_LAYOUT = Layout(",", tuple(_TYPES), _TYPES, time="timestamp")


class TaobaoSource:
    """The behaviours of one or several UserBehavior files.

    The group is "behaviors" with traits `item_id`, `category_id` (int64) and `action` (int8, see
    `TAOBAO_ACTIONS`). The label is 1 for anything beyond a page view. The event id is a hash of
    the whole row; of exact repeats, which the data set has, the store keeps the first.
    """

    group = FeatureGroup(
        "behaviors",
        [
            Trait("item_id", pa.int64()),
            Trait("category_id", pa.int64()),
            Trait("action", pa.int8()),
        ],
        duplicates="first",
    )
    label = BinaryLabel("action", at_least=1)

    def __init__(self, path: InputPath, on_cut_line: OnCutLine = "refuse") -> None:
        self.paths = find_files(path, ["UserBehavior*.csv"])
        self.num_bytes = total_size(self.paths)
        self.num_dropped = 0
        self._on_cut_line = on_cut_line
        for file in self.paths:
            first_line(file)

    def options(self) -> dict[str, Any]:
        return {"format": "taobao", "on_cut_line": self._on_cut_line}

    def batches(self, progress: Progress | None = None) -> Iterator[pa.RecordBatch]:
        behaviors = pa.array(list(TAOBAO_ACTIONS))
        codes = pa.array(list(TAOBAO_ACTIONS.values()), pa.int8())
        tally = Tally(progress=progress)
        for path in self.paths:
            for rows in read_rows(path, _LAYOUT, tally, self._on_cut_line):
                index = pc.index_in(rows.batch.column("behavior"), behaviors)
                rows.refuse_where(
                    index.is_null(), "behavior", "is not a known behaviour",
                    f"Known are {', '.join(TAOBAO_ACTIONS)}; repair or remove the line.",
                )  # fmt: skip
                times = time_in_us(rows, "timestamp", "s")
                user, item, category = (
                    rows.batch.column(name) for name in ("user_id", "item_id", "category_id")
                )
                action = codes.take(index)
                ids = content_ids([user, item, category, action, times])
                yield pa.record_batch(
                    [user, ids, times, item, category, action], schema=input_schema(self.group)
                )
        self.num_dropped = tally.num_dropped
        if tally.num_rows == 0:
            raise SourceFormatError(
                self.paths[0], "there is not a single whole line", line=None, value=None,
                way_out="Fetch the file again.",
            )  # fmt: skip
