"""The engine of one machine: DuckDB sorts, in a bounded amount of memory, spilling to disk.

What fits into one batch is sorted in place by Arrow: opening DuckDB costs more than sealing a window
of a thousand events does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pyarrow as pa

__all__ = ["LocalEngine"]

_ROWS_PER_BATCH = 122_880  # DuckDB's own row group: no copying to re-chunk


def _plain_type(kind: pa.DataType) -> pa.DataType:
    # DuckDB would need its ICU extension to carry time zones; it sorts integers as well.
    return pa.int64() if pa.types.is_timestamp(kind) else kind


@dataclass(frozen=True)
class LocalEngine:
    """Sorts through an in-process DuckDB, a fresh one each time.

    Attributes:
        memory_limit: what DuckDB may hold before it spills, e.g. "1GB".
        threads: how many it may use; None means one a core.
        in_memory_rows: inputs of at most so many rows are sorted by Arrow.
    """

    memory_limit: str = "1GB"
    threads: int | None = None
    in_memory_rows: int = _ROWS_PER_BATCH

    def sort(
        self,
        batches: Iterator[pa.RecordBatch],
        schema: pa.Schema,
        by: Sequence[str],
        scratch: Path,
    ) -> Iterator[pa.RecordBatch]:
        held: list[pa.RecordBatch] = []
        num_held = 0
        for batch in batches:
            held.append(batch)
            num_held += batch.num_rows
            if num_held > self.in_memory_rows:
                yield from self._sort_out_of_core(chain(held, batches), schema, by, scratch)
                return
        if num_held:
            keys = [(name, "ascending") for name in by]
            yield pa.concat_batches(held).cast(schema).sort_by(keys)

    def _sort_out_of_core(
        self,
        batches: Iterator[pa.RecordBatch],
        schema: pa.Schema,
        by: Sequence[str],
        scratch: Path,
    ) -> Iterator[pa.RecordBatch]:
        import duckdb

        plain = pa.schema([pa.field(f.name, _plain_type(f.type)) for f in schema])
        failure: list[BaseException] = []

        def feed() -> Iterator[pa.RecordBatch]:
            try:
                for batch in batches:
                    yield batch.cast(plain)
            except BaseException as error:  # DuckDB would turn it into an error of its own
                failure.append(error)
                raise

        connection = duckdb.connect(
            ":memory:",
            config={
                "threads": self.threads or os.cpu_count() or 1,
                "memory_limit": self.memory_limit,
                "temp_directory": str(scratch),
                "autoinstall_known_extensions": "false",
                "autoload_known_extensions": "false",
            },
        )
        try:
            connection.register("rows_in", pa.RecordBatchReader.from_batches(plain, feed()))
            # Names reach SQL only quoted, and were validated to be plain identifiers before.
            order = ", ".join('"' + name.replace('"', '""') + '"' for name in by)
            rows = connection.sql(f"SELECT * FROM rows_in ORDER BY {order}")
            for batch in rows.to_arrow_reader(_ROWS_PER_BATCH):
                if batch.num_rows:
                    yield batch.cast(schema)
        except duckdb.Error as error:
            if failure:
                raise failure[0] from None
            # The disk that it spills to failed, or is full.
            if isinstance(error, (duckdb.IOException, duckdb.OutOfMemoryException)):
                raise OSError(f"sorting failed: {str(error).splitlines()[0]}") from error
            raise
        finally:
            connection.close()
