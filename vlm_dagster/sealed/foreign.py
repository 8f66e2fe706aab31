"""Reading what another writer made of our files: slower, never wrong.

A rewrite by another tool (Delta's own OPTIMIZE, say) keeps the rows of a partition, but neither
their order nor our index, and may spread them over several files. So all files of one segment and
bucket are read as one: the order of the rows comes from their columns, and every read decodes the
whole of the columns asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlm_dagster.errors import CorruptFileError
from vlm_dagster.hashing import run_lengths
from vlm_dagster.sealed.reader import OnMissing, Piece
from vlm_dagster.sealed.spec import TableSpec
from vlm_dagster.sealed.stats import ReadStats
from vlm_dagster.sealed.stripes import Stripes
from vlm_dagster.sealed.users import UserIndex
from vlm_dagster.storage import Storage

__all__ = ["ForeignReader"]

I64 = npt.NDArray[np.int64]


class ForeignReader:
    """Reads files of one segment and bucket as if they were one of ours with a single band.

    Raises CorruptFileError, which names the file, when one is missing or lacks a column.
    """

    has_index = False
    fetches = False

    def __init__(
        self,
        storage: Storage,
        paths: Sequence[str],
        spec: TableSpec,
        version: int | None = None,
        stats: ReadStats | None = None,
        on_missing: OnMissing | None = None,
    ) -> None:
        self._storage = storage
        self._paths = list(paths)
        self._spec = spec
        self._version = version
        self._stats = stats or ReadStats()
        self._on_missing = on_missing
        keys = self._read(spec.sort_columns)
        self._order = pc.sort_indices(keys, [(name, "ascending") for name in spec.sort_columns])
        ordered = keys.take(self._order).combine_chunks()
        column = ordered.column("user_id")
        users, counts = run_lengths(
            column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
        )
        extremes = {}
        if spec.extremes and keys.num_rows:
            names = {n for e in spec.extremes for n in (e.plus, e.minus) if n is not None}
            (rows,) = self._read(sorted(names)).take(self._order).combine_chunks().to_batches()
            starts = np.cumsum(counts) - counts
            extremes = {e.name: e.of(rows, starts) for e in spec.extremes}
        self.users = UserIndex(users, counts, Stripes(), extremes)

    @property
    def path(self) -> str:
        return self._paths[0]

    @cached_property
    def num_bytes(self) -> int:
        """What this object holds in memory, roughly."""
        return int(self._order.nbytes) + self.users.num_bytes

    def _read(self, columns: Sequence[str]) -> pa.Table:
        schema = pa.schema([self._spec.columns.field(name) for name in columns])
        tables = []
        for path in self._paths:
            try:
                with self._storage.open_input(path) as source:
                    file = pq.ParquetFile(source)
                    table = file.read(columns=list(columns), use_threads=False)
                tables.append(table.select(list(columns)).cast(schema))
            except FileNotFoundError:
                if self._on_missing is not None:
                    self._on_missing(path, self._version)
                raise self._corrupt(path, "is missing") from None
            except (pa.ArrowException, OSError, ValueError, KeyError) as error:
                raise self._corrupt(path, f"cannot be read ({error})") from error
        found = pa.concat_tables(tables)
        self._stats.count_rows(found.num_rows, 0)
        return found

    def _corrupt(self, path: str, problem: str) -> CorruptFileError:
        return CorruptFileError(
            table=self._storage.uri, path=path, version=self._version, problem=problem
        )

    def pieces(self, starts: I64, counts: I64) -> tuple[list[Piece], I64]:
        """As `SegmentReader.pieces`: one of all rows."""
        return [Piece([], 0, len(self._order))], starts

    def open(self, columns: Sequence[str], pieces: Sequence[Piece]) -> None:
        """Nothing to open ahead."""

    def decode(
        self, source: None, columns: Sequence[str], pieces: Sequence[Piece]
    ) -> Iterator[tuple[int, str, pa.ChunkedArray]]:
        """As `SegmentReader.decode`."""
        for number, _ in enumerate(pieces):
            rows = self.read_groups(columns)
            yield from ((number, name, rows.column(name)) for name in columns)

    def read_groups(self, columns: Sequence[str], groups: list[int] | None = None) -> pa.Table:
        """All rows, sorted, these columns only; `groups` is None."""
        assert groups is None
        return self._read(columns).take(self._order).combine_chunks()
