"""The segment file: Parquet, sorted by user and time, with an index of its users in the footer.

Layout: rows sorted by (user, time, id), row groups of 65,536 rows, one codec, encodings chosen by type. Two
entries of the footer's key-value metadata are ours:

- `vlm.segment`: JSON; the format's version, the window, its bucket, the digest of this file's rows.
- `vlm.users`: the distinct users in order, how many rows each has, and what else the table's owner
  keeps about each: base64 of a zstd-compressed Arrow IPC stream (base64, because other readers insist
  on UTF-8 there).

A file's name is the SHA-256 of its bytes, so writing it twice is harmless, and a copy proves itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlm_dagster.errors import CorruptFileError, TableError
from vlm_dagster.hashing import Digest, digest_rows, run_lengths
from vlm_dagster.storage import Storage

__all__ = [
    "FILE_FORMAT",
    "Extreme",
    "SegmentReader",
    "SegmentWriter",
    "StagedFile",
    "UserIndex",
    "sha256_of",
]

FILE_FORMAT = 1
ROW_GROUP_ROWS = 65_536
CODEC = "lz4"
_HEADER_KEY = b"vlm.segment"
_USERS_KEY = b"vlm.users"

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StagedFile:
    """A data file in place but not committed. `stats` is the Delta statistics JSON."""

    path: str
    size: int
    bucket: int
    num_rows: int
    stats: str


@dataclass(frozen=True)
class UserIndex:
    """Which rows of a file are whose.

    Attributes:
        user_ids: [U] ascending.
        counts, starts: [U] user i has rows `[starts[i], starts[i] + counts[i])`, oldest first.
        extremes: what the table's owner keeps about each user beside, [U] each: the least or
            greatest value of a quantity over the user's rows.
    """

    user_ids: pa.Array
    counts: I64
    starts: I64
    extremes: dict[str, I64]

    @property
    def num_bytes(self) -> int:
        return int(self.user_ids.nbytes) + (2 + len(self.extremes)) * self.counts.nbytes


@dataclass(frozen=True)
class Extreme:
    """A quantity of a row whose least ("min") or greatest ("max") is kept for every user: the
    value of column `plus`, less that of column `minus` if given."""

    name: str
    keep: Literal["min", "max"]
    plus: str
    minus: str | None = None

    def of(self, rows: pa.RecordBatch, user_starts: I64) -> I64:
        """[U] over runs of rows that begin at `user_starts`."""
        values = rows.column(self.plus).to_numpy(zero_copy_only=False)
        if self.minus is not None:
            values = values - rows.column(self.minus).to_numpy(zero_copy_only=False)
        reduce = np.minimum if self.keep == "min" else np.maximum
        return np.asarray(reduce.reduceat(values, user_starts), np.int64)


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


def _encode_users(users: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(
        sink, users.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")
    ) as writer:
        writer.write_batch(users)
    return base64.b64encode(sink.getvalue())


def _decode_users(raw: bytes) -> UserIndex:
    (batch,) = pa.ipc.open_stream(base64.b64decode(raw))
    columns = {
        name: batch.column(name).to_numpy().astype(np.int64) for name in batch.schema.names[1:]
    }
    counts = columns.pop("num_rows")
    return UserIndex(batch.column("user_id"), counts, np.cumsum(counts) - counts, columns)


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
        self._local = local
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
        index = _encode_users(users)
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
                _HEADER_KEY: json.dumps(header, sort_keys=True).encode(),
                _USERS_KEY: index,
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


class SegmentReader:
    """Reads one committed file. Safe to share between threads: every read opens its own handle.

    Raises CorruptFileError, which names the file, when it is missing, cut short or not ours.
    """

    def __init__(self, storage: Storage, path: str, version: int | None = None) -> None:
        self._storage = storage
        self.path = path
        self._version = version
        try:
            with storage.open_input(path) as source:
                self._metadata = pq.read_metadata(source)
        except FileNotFoundError:
            raise self._corrupt("is missing") from None
        except (pa.ArrowInvalid, OSError, ValueError) as error:
            raise self._corrupt(f"cannot be read as Parquet ({error})") from error
        pairs = self._metadata.metadata or {}
        if _HEADER_KEY not in pairs or _USERS_KEY not in pairs:
            raise self._corrupt(
                "has no index of its users, so another writer must have rewritten the table"
            )
        self.header: dict[str, Any] = self._read_header(pairs[_HEADER_KEY])
        if self.header["format"] > FILE_FORMAT:
            raise TableError(
                storage.uri,
                f"file {path} has format {self.header['format']}, newer than this code's {FILE_FORMAT}",
                "Upgrade vlm-dagster.",
            )
        # Parquet checksums pages, but not its footer.
        if zlib.crc32(pairs[_USERS_KEY]) != self.header["index_crc32"]:
            raise self._corrupt("has a damaged index of its users")
        self.users = _decode_users(pairs[_USERS_KEY])
        sizes = [self._metadata.row_group(i).num_rows for i in range(self._metadata.num_row_groups)]
        self._group_ends = np.cumsum(np.asarray(sizes, np.int64))
        if int(self.users.counts.sum()) != sum(sizes):
            raise self._corrupt("has an index that does not count its rows")

    def _read_header(self, raw: bytes) -> dict[str, Any]:
        try:
            header: dict[str, Any] = json.loads(raw)
            Digest.parse(header["digest"])
            int(header["format"]), int(header["index_crc32"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._corrupt(f"has a damaged header ({error!r})") from None
        return header

    def _corrupt(self, problem: str) -> CorruptFileError:
        return CorruptFileError(
            table=self._storage.uri, path=self.path, version=self._version, problem=problem
        )

    @property
    def digest(self) -> Digest:
        return Digest.parse(self.header["digest"])

    @property
    def num_bytes(self) -> int:
        """What this object holds in memory, roughly."""
        return self.users.num_bytes + int(self._metadata.serialized_size)

    def read_rows(self, columns: Sequence[str], starts: I64, counts: I64) -> tuple[pa.Table, I64]:
        """Read row ranges.

        Args:
            columns: the columns to read; no other one is decoded.
            starts: [R] first row of each range, in ascending order.
            counts: [R] rows of each range.

        Returns:
            A table of the row groups that the ranges touch, and [R] where each range begins in it.
        """
        wanted = counts > 0
        first = np.searchsorted(self._group_ends, starts[wanted], side="right")
        last = np.searchsorted(self._group_ends, starts[wanted] + counts[wanted] - 1, side="right")
        touched = np.zeros(len(self._group_ends) + 1, np.int64)
        np.add.at(touched, first, 1)
        np.add.at(touched, last + 1, -1)
        chosen = np.cumsum(touched[:-1]) > 0
        sizes = np.diff(self._group_ends, prepend=0)
        skipped = np.cumsum(np.where(chosen, 0, sizes))
        table = self.read_groups(columns, np.flatnonzero(chosen).tolist())
        group_of = np.searchsorted(self._group_ends, starts, side="right")
        group_of = np.minimum(group_of, max(len(sizes) - 1, 0))
        moved = starts - (skipped[group_of] if len(sizes) else 0)
        return table, np.where(wanted, moved, 0)

    def read_groups(self, columns: Sequence[str], groups: list[int] | None = None) -> pa.Table:
        """Read whole row groups (all by default), these columns only, in the order asked for."""
        try:
            with self._storage.open_input(self.path) as source:
                file = pq.ParquetFile(
                    source,
                    metadata=self._metadata,
                    pre_buffer=False,
                    page_checksum_verification=True,
                )
                if groups is None:
                    groups = list(range(self._metadata.num_row_groups))
                return file.read_row_groups(
                    groups, columns=list(columns), use_threads=False
                ).select(list(columns))
        except FileNotFoundError:
            raise self._corrupt("is missing") from None
        except (pa.ArrowInvalid, OSError, ValueError) as error:
            raise self._corrupt(f"cannot be read ({error})") from error
