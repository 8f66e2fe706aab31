"""The engine of one machine: DuckDB sorts, in a bounded amount of memory, spilling to disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

__all__ = ["LocalEngine"]

_ROWS_PER_BATCH = 122_880  # DuckDB's own row group: no copying to re-chunk


def _plain_type(kind: pa.DataType) -> pa.DataType:
    # DuckDB would need its ICU extension to carry time zones; it sorts integers as well.
    return pa.int64() if pa.types.is_timestamp(kind) else kind


@dataclass(frozen=True)
class LocalEngine:
    """Sorts through an in-process DuckDB, a fresh one each time (opening it costs 5 ms).

    Attributes:
        memory_limit: what DuckDB may hold before it spills, e.g. "1GB".
        threads: how many it may use; None means one a core.
    """

    memory_limit: str = "1GB"
    threads: int | None = None

    def sort(
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
