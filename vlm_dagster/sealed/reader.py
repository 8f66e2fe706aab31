"""Reading a segment file: its index at once, and then only the rows and columns asked for."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from vlm_dagster.errors import CorruptFileError, SchemaError, StorageError, TableError
from vlm_dagster.hashing import Digest
from vlm_dagster.sealed.stats import ReadStats
from vlm_dagster.sealed.stripes import Stripes
from vlm_dagster.sealed.users import decode_users
from vlm_dagster.sealed.writer import FILE_FORMAT, HEADER_KEY, USERS_KEY, header_crc32
from vlm_dagster.storage import Storage

__all__ = ["NoIndexError", "OnMissing", "Piece", "SegmentReader"]

I64 = npt.NDArray[np.int64]
OnMissing = Callable[[str, int | None], None]


# Decoded at once: so few that they are still in the processor's cache when they are copied from.
_PIECE_ROWS = 131_072
# Read in one call: it costs 10 us less for each, and threads meet at the interpreter's lock less often.
# No more, so that memory is bounded for wide tables too.
_COLUMNS_AT_ONCE = 8
# What Arrow keeps in memory of each column of a row group, measured; the footer has some 115 bytes.
_CHUNK_BYTES = 1_200
# Of the footer and the page index before it: some 30 bytes for each column of a row group, and some
# 2 for each user.
_TAIL_BYTES = 256 << 10


@dataclass(frozen=True)
class Piece:
    """Row groups that are decoded together, and which of the rows read, counted over all pieces of
    their file, they hold: `[begin, end)`."""

    groups: list[int]
    begin: int
    end: int


class NoIndexError(CorruptFileError):
    """The file was not written by this package: `foreign.py` reads such files."""


def _read_footer(storage: Storage, path: str) -> pq.FileMetaData:
    """In one round trip, unless the footer is longer than most."""
    if not storage.fetches:
        with storage.open_input(path) as source:
            return pq.read_metadata(source)
    tail = storage.read_tail(path, _TAIL_BYTES)
    if len(tail) >= 8 and tail[-4:] == b"PAR1":
        needed = int.from_bytes(tail[-8:-4], "little") + 8
        if needed > len(tail) == _TAIL_BYTES:
            tail = storage.read_tail(path, needed)
    return pq.read_metadata(pa.BufferReader(tail))


class SegmentReader:
    """Reads one committed file. Safe to share between threads: every read opens its own handle.

    Raises CorruptFileError, which names the file, when it is missing, cut short or not ours.
    """

    has_index = True

    def __init__(
        self,
        storage: Storage,
        path: str,
        version: int | None = None,
        stats: ReadStats | None = None,
        on_missing: OnMissing | None = None,
    ) -> None:
        """
        Args:
            on_missing: called with path and version where the file is missing: raises if there is
                a better reason than damage.
        """
        self._storage = storage
        self.path = path
        self._version = version
        self._stats = stats or ReadStats()
        self._on_missing = on_missing
        try:
            self._metadata = _read_footer(storage, path)
        except FileNotFoundError:
            raise self._missing() from None
        except (pa.ArrowInvalid, OSError, ValueError) as error:
            raise self._unreadable("cannot be read as Parquet", error) from error
        pairs = self._metadata.metadata or {}
        if HEADER_KEY not in pairs or USERS_KEY not in pairs:
            raise NoIndexError(
                table=storage.uri,
                path=path,
                version=version,
                problem="has no index of its users, so another writer must have written it",
            )
        self._stats.count_footer(int(self._metadata.serialized_size))
        self.header: dict[str, Any] = self._read_header(pairs[HEADER_KEY])
        if self.header["format"] > FILE_FORMAT:
            raise TableError(
                storage.uri,
                f"file {path} has format {self.header['format']}, newer than this code's {FILE_FORMAT}",
                "Upgrade vlm-dagster.",
            )
        # Parquet checksums pages, but not its footer.
        if zlib.crc32(pairs[USERS_KEY]) != self.header["index_crc32"]:
            raise self._corrupt("has a damaged index of its users")
        stripes = self._stripes()
        self.users = decode_users(pairs[USERS_KEY], stripes)
        groups = range(self._metadata.num_row_groups)
        self._sizes = np.array([self._metadata.row_group(i).num_rows for i in groups], np.int64)
        self._group_ends = np.cumsum(self._sizes)
        # Per column, [G] whether the checksums of its pages were found right: files never change, so
        # once is enough, and it costs a sixth of the decoding.
        self._proved: dict[str, npt.NDArray[np.bool_]] = {}
        self._all_proved: set[str] = set()
        if self.users.counts.sum() != self._sizes.sum():
            raise self._corrupt("has an index that does not count its rows")

    def _read_header(self, raw: bytes) -> dict[str, Any]:
        try:
            header: dict[str, Any] = json.loads(raw)
            # The bands decide where rows are looked for: one digit that is wrong, and others are read.
            if header["format"] <= FILE_FORMAT and header.pop("crc32") != header_crc32(header):
                raise self._corrupt("has a damaged header")
            if header["format"] >= 2:
                header["digests"] = {k: Digest.parse(v) for k, v in header["digests"].items()}
            int(header["format"]), int(header["index_crc32"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._corrupt(f"has a damaged header ({error!r})") from None
        return header

    def _stripes(self) -> Stripes:
        """Striped files without an edge still have their users in order of activity."""
        try:
            edges = list(self.header["bands"])
            return Stripes.of(edges or ([2**62] if self.header["striped"] else []))
        except (KeyError, TypeError, SchemaError) as error:
            raise self._corrupt(f"has a damaged header ({error!r})") from None

    def check_owner(self, table_id: str, columns: pa.Schema) -> None:
        """CorruptFileError unless the file was written for this table, and for its own place."""
        try:
            found = self._metadata.schema.to_arrow_schema()
        except (pa.ArrowException, ValueError) as error:
            raise self._corrupt(f"has a damaged schema ({error})") from error
        if not found.equals(columns):
            raise self._corrupt("has other columns than the table")
        header = self.header
        place = f"segment={header.get('segment')}/bucket={header.get('bucket')}/"
        if header.get("table_id") != table_id or not self.path.startswith(place):
            raise self._corrupt(
                f"is the file of bucket {header.get('bucket')} of segment {header.get('segment')} "
                f"of table {header.get('table_id')}"
            )

    def _missing(self) -> CorruptFileError:
        if self._on_missing is not None:
            self._on_missing(self.path, self._version)
        return self._corrupt("is missing")

    def _unreadable(self, problem: str, error: Exception) -> Exception:
        """Damage, unless it is storage that refused: then the file may be as good as ever."""
        if isinstance(error, StorageError):
            return error
        if isinstance(error, OSError) and error.errno is not None:
            return StorageError(self._storage.uri, f"reading {self.path}", error, writing=False)
        return self._corrupt(f"{problem} ({error})")

    def _corrupt(self, problem: str) -> CorruptFileError:
        return CorruptFileError(
            table=self._storage.uri, path=self.path, version=self._version, problem=problem
        )

    @property
    def digests(self) -> dict[str, Digest]:
        """Of its rows in each window of its segment, by the window's key as a partition value."""
        found: dict[str, Digest] = self.header["digests"]
        return found

    @property
    def num_row_groups(self) -> int:
        return len(self._group_ends)

    @property
    def group_ends(self) -> I64:
        """[G] the row just past each row group."""
        return self._group_ends

    @property
    def uncompressed_bytes(self) -> dict[str, int]:
        """Per column, the bytes of its encoded pages before compression."""
        groups = [self._metadata.row_group(g) for g in range(self._metadata.num_row_groups)]
        names = [self._metadata.schema.column(i).name for i in range(self._metadata.num_columns)]
        return {
            name: sum(group.column(i).total_uncompressed_size for group in groups)
            for i, name in enumerate(names)
        }

    @cached_property
    def column_bytes(self) -> dict[str, I64]:
        """Per column, [G] the bytes of its pages in every row group."""
        names = [self._metadata.schema.column(i).name for i in range(self._metadata.num_columns)]
        groups = [self._metadata.row_group(g) for g in range(self._metadata.num_row_groups)]
        return {
            name: np.array([g.column(i).total_compressed_size for g in groups], np.int64)
            for i, name in enumerate(names)
        }

    @property
    def num_bytes(self) -> int:
        """What this object holds in memory, roughly."""
        chunks = int(self._metadata.num_row_groups * self._metadata.num_columns)
        return self.users.num_bytes + int(self._metadata.serialized_size) + chunks * _CHUNK_BYTES

    def pieces(self, starts: I64, counts: I64) -> tuple[list[Piece], I64]:
        """Which row groups hold some row ranges.

        Args:
            starts: [R] first row of each range, in any order.
            counts: [R] rows of each range, at least 1.

        Returns:
            The row groups that the ranges touch, in pieces, and [R] where each range begins among
            the rows of these pieces, one after another.
        """
        if len(self._group_ends) == 1:  # as most files of a small window are
            return [Piece([0], 0, int(self._group_ends[0]))], starts
        first = np.searchsorted(self._group_ends, starts, side="right")
        last = np.searchsorted(self._group_ends, starts + counts - 1, side="right")
        touched = np.zeros(len(self._group_ends) + 1, np.int64)
        np.add.at(touched, first, 1)
        np.add.at(touched, last + 1, -1)
        chosen = np.cumsum(touched[:-1]) > 0
        skipped = np.cumsum(np.where(chosen, 0, self._sizes))
        pieces: list[Piece] = []
        groups: list[int] = []
        begin = end = 0
        taken = np.flatnonzero(chosen)
        for group, size in zip(taken.tolist(), self._sizes[taken].tolist(), strict=True):
            if groups and end + size > begin + _PIECE_ROWS:
                pieces.append(Piece(groups, begin, end))
                groups, begin = [], end
            groups.append(group)
            end += size
        pieces.append(Piece(groups, begin, end))
        return pieces, starts - skipped[first]

    def open(self, columns: Sequence[str], pieces: Sequence[Piece]) -> Any:
        """A source for `decode` of the same columns and pieces. Where reading takes a round trip, it
        begins to fetch them now."""
        groups = [group for piece in pieces for group in piece.groups]
        try:
            return self._open_groups(columns, groups)
        except FileNotFoundError:
            raise self._missing() from None
        except OSError as error:
            raise self._unreadable("cannot be read", error) from error

    def _open_groups(self, columns: Sequence[str], groups: Sequence[int]) -> Any:
        if not self._storage.fetches:
            return self._storage.open_ranges(self.path, [])  # it would not use them
        ranges = [self._chunk_ranges[name][group] for name in columns for group in groups]
        return self._storage.open_ranges(self.path, ranges)

    @cached_property
    def _chunk_ranges(self) -> dict[str, list[tuple[int, int]]]:
        """Per column, [G] the bytes `[start, end)` of the file that its pages take."""
        found: dict[str, list[tuple[int, int]]] = {}
        for g in range(self._metadata.num_row_groups):
            group = self._metadata.row_group(g)
            for i in range(self._metadata.num_columns):
                chunk = group.column(i)
                start = chunk.data_page_offset
                if chunk.has_dictionary_page:
                    start = min(start, chunk.dictionary_page_offset)
                found.setdefault(chunk.path_in_schema, []).append(
                    (start, start + chunk.total_compressed_size)
                )
        return found

    @property
    def fetches(self) -> bool:
        """Whether it pays to `open` ahead."""
        return self._storage.fetches

    def num_bytes_of(self, columns: Sequence[str], pieces: Sequence[Piece]) -> int:
        """What `decode` of these columns and pieces reads."""
        groups = [group for piece in pieces for group in piece.groups]
        return sum(int(self.column_bytes[name][groups].sum()) for name in columns)

    def decode(
        self, source: Any, columns: Sequence[str], pieces: Sequence[Piece]
    ) -> Iterator[tuple[int, str, pa.ChunkedArray]]:
        """The number of each piece, a column's name, and the values of its rows: a piece at a time, so
        that they are still in the processor's cache when they are copied from. Closes the source at
        the end."""
        groups = [group for piece in pieces for group in piece.groups]
        proved = self._is_proved(columns, groups)
        try:
            with source:
                file = self._file(source, proved)
                self._count(groups, columns)
                for number, piece in enumerate(pieces):
                    for at in range(0, len(columns), _COLUMNS_AT_ONCE):
                        names = columns[at : at + _COLUMNS_AT_ONCE]
                        found = self._read(file, piece.groups, names)
                        for name in names:
                            yield number, name, found.column(name)
        except FileNotFoundError:
            raise self._missing() from None
        except (pa.ArrowInvalid, OSError, ValueError) as error:
            raise self._unreadable("cannot be read", error) from error
        if not proved:
            self._prove(columns, groups)

    def read_groups(self, columns: Sequence[str], groups: list[int] | None = None) -> pa.Table:
        """Read whole row groups (all by default), these columns only, in the order asked for."""
        if groups is None:
            groups = list(range(self._metadata.num_row_groups))
        piece = Piece(groups, 0, 0)
        found = self.decode(self.open(columns, [piece]), columns, [piece])
        return pa.table({name: values for _, name, values in found})

    def _file(self, source: Any, proved: bool) -> pq.ParquetFile:
        return pq.ParquetFile(
            source,
            metadata=self._metadata,
            pre_buffer=False,
            page_checksum_verification=not proved,
        )

    def _read(self, file: pq.ParquetFile, groups: list[int], columns: Sequence[str]) -> pa.Table:
        # `file.read_row_groups` would look up every column's path each time, 40 us.
        indices = [self._column_indices[column] for column in columns]
        found = file.reader.read_row_groups(groups, column_indices=indices, use_threads=False)
        num_rows = int(self._sizes[groups].sum())
        for name, column in zip(found.column_names, found.itercolumns(), strict=True):
            if len(column) != num_rows:  # page headers carry no checksum
                raise ValueError(f"{len(column)} values of {name}")
        return found

    @cached_property
    def _column_indices(self) -> dict[str, int]:
        names = [self._metadata.schema.column(i).name for i in range(self._metadata.num_columns)]
        return {name: i for i, name in enumerate(names)}

    def _is_proved(self, columns: Sequence[str], groups: list[int]) -> bool:
        if self._all_proved.issuperset(columns):
            return True
        blank = np.zeros(len(self._group_ends), bool)
        return all(self._proved.get(name, blank)[groups].all() for name in columns)

    def _prove(self, columns: Sequence[str], groups: list[int]) -> None:
        for name in columns:
            found = self._proved.setdefault(name, np.zeros(len(self._group_ends), bool))
            found[groups] = True
            if found.all():
                self._all_proved.add(name)

    def _count(self, groups: list[int], columns: Sequence[str]) -> None:
        if self._stats.counts_bytes:
            num_bytes = sum(int(self.column_bytes[name][groups].sum()) for name in columns)
        else:
            num_bytes = 0
        self._stats.count_rows(int(self._sizes[groups].sum()), num_bytes)
