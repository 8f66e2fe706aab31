"""Writing a segment file: Parquet, sorted by user and time, with an index of its users in the footer.

Row groups of 65,536 rows, one codec, encodings chosen by type. Two entries of the footer's key-value
metadata are ours:

- `vlm.segment`: JSON; the format's version, the window, its bucket, the digest of this file's rows.
- `vlm.users`: the distinct users in order, how many rows each has, and what else the table's owner
  keeps about each: base64 of a zstd-compressed Arrow IPC stream (base64, because other readers insist
  on UTF-8 there).

A file's name is the SHA-256 of its bytes, so writing it twice is harmless, and a copy proves itself.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlm_dagster.hashing import Digest, digest_rows, run_lengths
from vlm_dagster.sealed.users import Extreme, encode_users

__all__ = ["FILE_FORMAT", "HEADER_KEY", "USERS_KEY", "SegmentWriter", "StagedFile", "sha256_of"]

FILE_FORMAT = 1
HEADER_KEY = b"vlm.segment"
USERS_KEY = b"vlm.users"
ROW_GROUP_ROWS = 65_536
CODEC = "lz4"


@dataclass(frozen=True)
class StagedFile:
    """A data file in place but not committed. `stats` is the Delta statistics JSON."""

    path: str
    size: int
    bucket: int
    num_rows: int
    stats: str


def sha256_of(path: Path) -> str:
    """The SHA-256 of a local file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class SegmentWriter:
    """Writes one file from chunks of rows that arrive sorted.

    Args:
        local: where to write; the caller moves it into place.
        schema: the columns, without the partition columns.
        header: what `vlm.segment` says beside the format, the digest and the counts.
        sort_columns: the columns that the rows are sorted by.
        extremes: what to keep about every user beside the number of rows.
    """

    def __init__(
        self,
        local: Path,
        schema: pa.Schema,
        header: dict[str, Any],
        sort_columns: Sequence[str],
        extremes: Sequence[Extreme] = (),
    ) -> None:
        self._schema = schema
        self._header = header
        self._time = sort_columns[1]
        self._pending: list[pa.RecordBatch] = []
        self._num_pending = 0
        self._extremes = extremes
        self._users: list[pa.RecordBatch] = []
        self._time_range: tuple[int, int] | None = None
        self.num_rows = 0
        self.digest = Digest()
        self._writer = pq.ParquetWriter(
            local,
            schema,
            compression=CODEC,
            version="2.6",
            data_page_version="1.0",
            write_statistics=True,
            write_page_index=True,
            write_page_checksum=True,
            sorting_columns=[
                pq.SortingColumn(schema.get_field_index(name)) for name in sort_columns
            ],
            store_schema=False,
            **_encodings(schema),
        )

    def write(self, rows: pa.RecordBatch) -> None:
        """Append rows; all rows of a user come in one call."""
        rows = rows.select(self._schema.names)
        self.digest = self.digest + digest_rows(rows)
        self.num_rows += rows.num_rows
        users, counts = run_lengths(rows.column("user_id"))
        columns = {"user_id": users, "num_rows": pa.array(counts, pa.uint32())}
        for extreme in self._extremes:
            columns[extreme.name] = pa.array(extreme.of(rows, np.cumsum(counts) - counts))
        self._users.append(pa.record_batch(columns))
        extremes = pc.min_max(rows.column(self._time).cast(pa.int64())).as_py()
        low, high = self._time_range or (extremes["min"], extremes["max"])
        self._time_range = (min(low, extremes["min"]), max(high, extremes["max"]))
        self._pending.append(rows)
        self._num_pending += rows.num_rows
        if self._num_pending >= ROW_GROUP_ROWS:
            self._flush(final=False)

    def _flush(self, final: bool) -> None:
        if not self._num_pending:
            return
        table = pa.Table.from_batches(self._pending).cast(self._schema)
        whole = table.num_rows if final else table.num_rows // ROW_GROUP_ROWS * ROW_GROUP_ROWS
        self._writer.write_table(table.slice(0, whole), row_group_size=ROW_GROUP_ROWS)
        rest = table.slice(whole)
        self._pending = rest.to_batches()
        self._num_pending = rest.num_rows

    @property
    def num_users(self) -> int:
        return sum(users.num_rows for users in self._users)

    def close(self) -> str:
        """Finish the file; returns its Delta statistics."""
        self._flush(final=True)
        users = pa.concat_batches(self._users)
        index = encode_users(users)
        header = {
            **self._header,
            "format": FILE_FORMAT,
            "index_crc32": zlib.crc32(index),
            "num_rows": self.num_rows,
            "num_users": users.num_rows,
            "digest": str(self.digest),
        }
        self._writer.add_key_value_metadata(
            {
                HEADER_KEY: json.dumps(header, sort_keys=True).encode(),
                USERS_KEY: index,
            }
        )
        self._writer.close()
        return self._stats(users.column("user_id"))

    def abandon(self) -> None:
        """Close the handle of a file that will be thrown away."""
        self._writer.close()

    def _stats(self, users: pa.Array) -> str:
        assert self._time_range is not None  # a file is never empty
        # Delta keeps statistics of times in whole milliseconds: round outwards.
        low: dict[str, object] = {self._time: _iso_ms(self._time_range[0] // 1000)}
        high: dict[str, object] = {self._time: _iso_ms(-(-self._time_range[1] // 1000))}
        low["user_id"], high["user_id"] = users[0].as_py(), users[-1].as_py()
        if any(
            isinstance(value, str) and len(value) > 64 for value in (*low.values(), *high.values())
        ):
            del low["user_id"], high["user_id"]
        nulls = dict.fromkeys(self._schema.names, 0)
        return json.dumps(
            {"numRecords": self.num_rows, "minValues": low, "maxValues": high, "nullCount": nulls}
        )


def _iso_ms(time_ms: int) -> str:
    text = str(np.datetime64(time_ms, "ms"))
    return f"{text}Z"


def _encodings(schema: pa.Schema) -> dict[str, Any]:
    delta = [
        f.name
        for f in schema
        if pa.types.is_timestamp(f.type) or f.type in (pa.int32(), pa.int64())
    ]
    # Event ids differ in every row: a dictionary of them only costs.
    plain = ["event_id", "example_id", *(f.name for f in schema if f.type == pa.bool_())]
    return {
        "use_dictionary": [f.name for f in schema if f.name not in (*delta, *plain)],
        "column_encoding": dict.fromkeys(delta, "DELTA_BINARY_PACKED"),
    }
