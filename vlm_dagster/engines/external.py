"""Sorting what is too large for memory: DuckDB, which spills."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["sorted_by_duckdb", "whole_users"]

_ROWS_PER_BATCH = 122_880  # DuckDB's own row group: no copying to re-chunk

_LEAST_BYTES = 32_000_000
_BYTES_PER_THREAD = 64_000_000


def _plain_type(kind: pa.DataType) -> pa.DataType:
    # DuckDB would need its ICU extension to carry time zones; it sorts integers as well.
    return pa.int64() if pa.types.is_timestamp(kind) else kind


def sorted_by_duckdb(
    batches: Iterator[pa.RecordBatch],
    schema: pa.Schema,
    by: Sequence[str],
    scratch: Path,
    *,
    memory_bytes: int,
    threads: int,
) -> Generator[pa.RecordBatch, None, None]:
    """The same rows in order.

    Args:
        memory_bytes: what DuckDB may hold before it spills; it needs some to work at all.
        threads: the most that it uses, each of which needs memory of its own.

    Raises:
        OSError: the disk that it spills to failed, or is full.
    """
    import duckdb

    memory_bytes = max(memory_bytes, _LEAST_BYTES)
    plain = pa.schema([pa.field(f.name, _plain_type(f.type)) for f in schema])
    connection = duckdb.connect(
        ":memory:",
        config={
            "threads": max(min(threads, memory_bytes // _BYTES_PER_THREAD), 1),
            "memory_limit": f"{memory_bytes // 1000}KB",
            "temp_directory": str(scratch),
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
        },
    )
    try:
        rows_in = pa.RecordBatchReader.from_batches(
            plain, (b.select(plain.names).cast(plain) for b in batches)
        )
        connection.register("rows_in", rows_in)
        # Names reach SQL only quoted, and were validated to be plain identifiers before.
        order = ", ".join('"' + name.replace('"', '""') + '"' for name in by)
        rows = connection.sql(f"SELECT * FROM rows_in ORDER BY {order}")
        for batch in rows.to_arrow_reader(_ROWS_PER_BATCH):
            if batch.num_rows:
                yield batch.cast(schema)
    except duckdb.Error as error:
        # The disk that it spills to failed, or is full.
        if isinstance(error, (duckdb.IOException, duckdb.OutOfMemoryException)):
            raise OSError(f"sorting failed: {str(error).splitlines()[0]}") from error
        raise
    finally:
        connection.close()


def whole_users(batches: Iterator[pa.RecordBatch], user: str) -> Iterator[pa.RecordBatch]:
    """Re-cut a stream sorted by `user` so that nobody's rows are spread over two chunks."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        users = batch.column(user)
        last = users[-1]
        if held and held[-1].column(user)[-1] == last:
            held.append(batch)  # the whole batch is one user's, who goes on
            if users[0] != last:
                raise AssertionError("rows are not sorted by user")
            continue
        cut = int(pc.index(users, last).as_py())
        if held or cut:
            yield _joined([*held, batch.slice(0, cut)])
        held = [batch.slice(cut)]
    if held:
        yield _joined(held)


def _joined(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    return batches[0] if len(batches) == 1 else pa.concat_batches(batches)
