"""MovieLens ratings: `u.data` (tabs), `ratings.dat` (`::`) and `ratings.csv`, all releases.

The first line tells which of the three a file is; its name does not matter.
"""

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

__all__ = ["MovieLensSource"]

_TYPES = {
    "userId": pa.int64(),
    "movieId": pa.int64(),
    "rating": pa.float32(),
    "timestamp": pa.int64(),
}
_COLUMNS = tuple(_TYPES)


class MovieLensSource:
    """The ratings of one or several MovieLens files.

    The group is "ratings" with traits `item_id` (int64) and `rating` (float32, 0.5 to 5). The
    event id is a hash of the whole row: a rating has no id of its own, and an id that grows with
    the item would let a model guess the order of the many ratings made in the same second. Exact
    repeats of a row share an id; of these the store keeps the first.
    """

    group = FeatureGroup(
        "ratings",
        [Trait("item_id", pa.int64()), Trait("rating", pa.float32())],
        duplicates="first",
    )
    label = BinaryLabel("rating", at_least=4)

    def __init__(self, path: InputPath, on_cut_line: OnCutLine = "refuse") -> None:
        self.paths = find_files(path, ["u.data", "ratings.dat", "ratings.csv"])
        self.num_bytes = total_size(self.paths)
        self.num_dropped = 0
        self._on_cut_line = on_cut_line
        self._layouts = [_layout(path) for path in self.paths]

    def options(self) -> dict[str, Any]:
        return {"format": "movielens", "on_cut_line": self._on_cut_line}

    def batches(self, progress: Progress | None = None) -> Iterator[pa.RecordBatch]:
        tally = Tally(progress=progress)
        for path, layout in zip(self.paths, self._layouts, strict=True):
            for rows in read_rows(path, layout, tally, self._on_cut_line):
                rating = rows.batch.column("rating")
                # Written so that NaN fails too.
                good = pc.and_(pc.greater_equal(rating, 0.5), pc.less_equal(rating, 5.0))
                rows.refuse_where(
                    pc.invert(good), "rating", "is not a rating from 0.5 to 5",
                    "Check the order of the columns: user, item, rating, timestamp.",
                )  # fmt: skip
                times = time_in_us(rows, "timestamp", "s")
                user, item = rows.batch.column("userId"), rows.batch.column("movieId")
                ids = content_ids([user, item, rating, rows.batch.column("timestamp")])
                yield pa.record_batch(
                    [user, ids, times, item, rating], schema=input_schema(self.group)
                )
        self.num_dropped = tally.num_dropped
        if tally.num_rows == 0:
            raise SourceFormatError(
                self.paths[0], "there is not a single rating", line=None, value=None,
                way_out="Fetch the file again; a ratings file is never empty.",
            )  # fmt: skip


def _layout(path: str) -> Layout:
    line = first_line(path)
    if line.count("::") == 3:
        return Layout("::", _COLUMNS, _TYPES, time="timestamp")
    if line.count("\t") == 3:
        return Layout("\t", _COLUMNS, _TYPES, time="timestamp")
    names = [name.strip().strip('"').lower() for name in line.split(",")]
    if names == [name.lower() for name in _COLUMNS]:
        return Layout(",", _COLUMNS, _TYPES, time="timestamp", header=True, quotes=True)
    raise SourceFormatError(
        path, "is not a MovieLens ratings file", line=1, value=line[:160],
        way_out="Expected are four fields between tabs (u.data) or `::` (ratings.dat), or the "
        'header userId,movieId,rating,timestamp (ratings.csv). Use format="csv" and a mapping '
        "for anything else.",
    )  # fmt: skip
