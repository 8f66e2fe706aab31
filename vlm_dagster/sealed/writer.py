"""Writing a segment file: Parquet in stripes, with an index of its users in the footer.

Rows lie in bands (stripes.py), no row group spans two of them; encodings and codecs by kind of trait
(encodings.py). Two entries of the footer's key-value metadata are ours:

- `vlm.segment`: JSON; the format's version, the segment, its bucket, the bands, the digest of this
  file's rows in each window, checksums of the index and of itself.
- `vlm.users`: the distinct users in order, how many rows each has, and what else the table's owner
  keeps about each: base64 of a zstd-compressed Arrow IPC stream (base64, because other readers insist
  on UTF-8 there).

A file's name is the SHA-256 of its bytes, so writing it twice is harmless, and a copy proves itself.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlm_dagster.encodings import writer_options
from vlm_dagster.hashing import Digest, digest_rows, run_lengths
from vlm_dagster.sealed.gathering import gather
from vlm_dagster.sealed.spool import Spool
from vlm_dagster.sealed.stripes import Stripes
from vlm_dagster.sealed.users import Extreme, encode_users

__all__ = [
    "FILE_FORMAT",
    "HEADER_KEY",
    "USERS_KEY",
    "SegmentWriter",
    "StagedFile",
    "header_crc32",
    "sha256_of",
]

I64 = npt.NDArray[np.int64]

FILE_FORMAT = 2
HEADER_KEY = b"vlm.segment"
USERS_KEY = b"vlm.users"
HELD_BYTES = 128 << 20
_ONE_BAND = Stripes()
# Handed to Parquet at once: some whole row groups of every band.
_ROWS_AT_ONCE = 131_072


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


def header_crc32(header: Mapping[str, Any]) -> str:
    """Of all that a header says, as JSON with sorted keys: 8 hex digits."""
    return f"{zlib.crc32(json.dumps(header, sort_keys=True).encode()):08x}"


class SegmentWriter:
    """Writes one file from chunks of rows that arrive sorted by user, time and id.

    Rows are held until all have come, since the newest of every user stand first. Those that come
    in one chunk are in memory anyway, and go from there into the file; of several chunks, what is
    beyond `memory_limit` waits on disk beside the file. The file is the same.

    Args:
        local: where to write; the caller moves it into place.
        schema: the columns, without the partition columns.
        header: what `vlm.segment` says beside what this class adds.
        sort_columns: the columns that the rows are sorted by.
        extremes: what to keep about every user beside the number of rows.
        stripes: the bands; edges that no user reaches past are left out.
        encodings: of columns that are not stored as their type would be.
        digests: gives the digest of some rows in each window, by its key.
        memory_limit: bytes of rows to hold; None means HELD_BYTES.
    """

    def __init__(
        self,
        local: Path,
        schema: pa.Schema,
        header: dict[str, Any],
        sort_columns: Sequence[str],
        extremes: Sequence[Extreme] = (),
        *,
        stripes: Stripes = _ONE_BAND,
        encodings: Mapping[str, str] = MappingProxyType({}),
        digests: Callable[[pa.RecordBatch], dict[str, Digest]] | None = None,
        memory_limit: int | None = None,
    ) -> None:
        self._schema = schema
        self._header = header
        self._extremes = extremes
        self._stripes = stripes
        self._digests_of = digests or (lambda rows: {header["segment"]: digest_rows(rows)})
        self._users: list[pa.RecordBatch] = []
        self._only: tuple[pa.RecordBatch, I64] | None = None
        self.num_rows = 0
        self.digests: dict[str, Digest] = {}
        limit = HELD_BYTES if memory_limit is None else memory_limit
        self._spool: Spool[tuple[int, int]] = Spool(local.parent, local.name, schema, limit)
        sorting = [] if stripes.edges else [schema.get_field_index(name) for name in sort_columns]
        self._writer = pq.ParquetWriter(
            local,
            schema,
            version="2.6",
            data_page_version="1.0",
            write_statistics=True,
            write_page_index=True,
            write_page_checksum=True,
            sorting_columns=[pq.SortingColumn(i) for i in sorting] or None,
            store_schema=False,
            **writer_options(schema, encodings),
        )

    def write(self, rows: pa.RecordBatch) -> None:
        """Append rows; all rows of a user come in one call."""
        # Exactly the schema, or those that waited on disk would not join those that did not.
        rows = rows.select(self._schema.names).cast(self._schema)
        for key, digest in self._digests_of(rows).items():
            self.digests[key] = self.digests.get(key, Digest()) + digest
        self.num_rows += rows.num_rows
        users, counts = run_lengths(rows.column("user_id"))
        columns = {"user_id": users, "num_rows": pa.array(counts, pa.uint32())}
        for extreme in self._extremes:
            columns[extreme.name] = pa.array(extreme.of(rows, np.cumsum(counts) - counts))
        self._users.append(pa.record_batch(columns))
        if len(self._users) == 1:
            self._only = (rows, counts)
            return
        if self._only is not None:
            self._keep(*self._only)
            self._only = None
        self._keep(rows, counts)

    def _keep(self, rows: pa.RecordBatch, counts: I64) -> None:
        """Cut the rows into stripes and put these where they wait."""
        num_bytes = max(rows.nbytes // rows.num_rows, 1)
        lows, highs = self._stripes.cut(counts)
        keys = self._stripes.keys(counts)
        if len(lows) == 1 or (not highs[1:].any() and (keys == keys[0]).all()):
            self._spool.add((0, int(keys[0])), rows, num_bytes * rows.num_rows)
            return
        bands, users = np.nonzero(highs > lows)
        order = np.lexsort((users, keys[users], bands))
        bands, users = bands[order], users[order]
        starts = (np.cumsum(counts) - counts)[users] + lows[bands, users]
        sizes = (highs - lows)[bands, users]
        cut = pa.record_batch(
            [gather(column, starts, sizes) for column in rows.columns], schema=rows.schema
        )
        ends = np.cumsum(sizes)
        places = np.stack([bands, keys[users]])
        last = np.flatnonzero(np.append((np.diff(places) != 0).any(axis=0), True))
        begin = 0
        for i in last.tolist():
            size = int(ends[i]) - begin
            place = (int(places[0, i]), int(places[1, i]))
            self._spool.add(place, cut.slice(begin, size), size * num_bytes)
            begin += size

    def _write_only(self, rows: pa.RecordBatch, counts: I64) -> None:
        """The bands of the only chunk, a few row groups of each at a time."""
        order = np.argsort(self._stripes.keys(counts), kind="stable")
        begins = (np.cumsum(counts) - counts)[order]
        lows, highs = self._stripes.cut(counts)
        for band in range(self._stripes.num_bands):
            sizes = (highs[band] - lows[band])[order]
            some = sizes > 0
            starts, sizes = (begins + lows[band][order])[some], sizes[some]
            ends = np.cumsum(sizes)
            num_rows = int(ends[-1]) if len(ends) else 0
            step = self._rows_at_once(band)
            for low in range(0, num_rows, step):
                high = min(low + step, num_rows)
                first, last = np.searchsorted(ends, [low, high - 1], side="right").tolist()
                # Of the first and last stripes, what lies between `low` and `high`.
                skipped = low - (ends[first] - sizes[first])
                some_starts, some_sizes = (
                    starts[first : last + 1].copy(),
                    sizes[first : last + 1].copy(),
                )
                some_starts[0] += skipped
                some_sizes[0] -= skipped
                some_sizes[-1] -= ends[last] - high
                self._write_table(_ranges(rows, some_starts, some_sizes), band)

    def _rows_at_once(self, band: int) -> int:
        group_rows = self._stripes.group_rows(band)
        return max(_ROWS_AT_ONCE // group_rows, 1) * group_rows

    def _write_table(self, rows: pa.Table, band: int) -> None:
        # How a page is cut depends on the chunks that its values come in: there is always one.
        self._writer.write_table(
            rows.combine_chunks(), row_group_size=self._stripes.group_rows(band)
        )

    def _write_bands(self) -> None:
        places = sorted(self._spool.keys())
        for band, held in groupby(places, key=lambda place: place[0]):
            step = self._rows_at_once(band)
            pending: list[pa.RecordBatch] = []
            num_pending = 0
            for batch in chain.from_iterable(map(self._spool.take, held)):
                pending.append(batch)
                num_pending += batch.num_rows
                if num_pending >= step:
                    table = pa.Table.from_batches(pending)
                    whole = num_pending // step * step
                    for low in range(0, whole, step):
                        self._write_table(table.slice(low, step), band)
                    pending = table.slice(whole).to_batches()
                    num_pending -= whole
            if num_pending:
                self._write_table(pa.Table.from_batches(pending), band)

    @property
    def digest(self) -> Digest:
        """Of all rows so far."""
        return Digest.sum(self.digests.values())

    @property
    def num_users(self) -> int:
        return sum(users.num_rows for users in self._users)

    def close(self) -> str:
        """Finish the file; returns its Delta statistics."""
        if self._only is not None:
            self._write_only(*self._only)
            self._only = None
        self._write_bands()
        users = pa.concat_batches(self._users)
        longest = int(pc.max(users.column("num_rows")).as_py())
        index = encode_users(users)
        header = {
            **self._header,
            "format": FILE_FORMAT,
            "index_crc32": zlib.crc32(index),
            "num_rows": self.num_rows,
            "num_users": users.num_rows,
            "bands": list(self._stripes.upto(longest).edges),
            "striped": bool(self._stripes.edges),
            "digests": {key: str(digest) for key, digest in sorted(self.digests.items())},
        }
        header["crc32"] = header_crc32(header)
        self._writer.add_key_value_metadata(
            {
                HEADER_KEY: json.dumps(header, sort_keys=True).encode(),
                USERS_KEY: index,
            }
        )
        self._writer.close()
        return self._stats()

    def abandon(self) -> None:
        """Close the handle of a file that will be thrown away."""
        self._spool.close()
        self._writer.close()

    def _stats(self) -> str:
        # No least and greatest values. Those of users would name them in the log, which is kept for
        # ever; and where only some columns have them, pyarrow's datasets, as deltalake makes them,
        # compare all others with null and find nothing. Files are pruned by bucket and segment.
        nulls = dict.fromkeys(self._schema.names, 0)
        return json.dumps({"numRecords": self.num_rows, "nullCount": nulls})


def _ranges(rows: pa.RecordBatch, starts: I64, sizes: I64) -> pa.Table:
    """Ranges of rows, one after another."""
    if (starts[1:] == starts[:-1] + sizes[:-1]).all():
        return pa.Table.from_batches([rows.slice(int(starts[0]), int(sizes.sum()))])
    columns = [gather(column, starts, sizes) for column in rows.columns]
    return pa.Table.from_arrays(columns, schema=rows.schema)
