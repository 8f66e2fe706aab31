"""Where bulk work runs. An engine brings together the rows of every bucket, sorted, though all of
them need not fit into memory, and has each bucket worked on.

The local engine (threads, with DuckDB for what is too large for memory) is the only one so far;
another needs to offer `Engine`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import pyarrow as pa

__all__ = ["Engine"]

T = TypeVar("T")


class Engine(Protocol):
    """Sorts rows by bucket, ascending and without nulls; strings by their UTF-8 bytes."""

    def map_buckets(
        self,
        batches: Iterator[pa.RecordBatch],
        schema: pa.Schema,
        by: Sequence[str],
        num_buckets: int,
        scratch: Path,
        work: Callable[[int, Iterator[pa.RecordBatch]], T],
    ) -> list[T]:
        """Call `work(bucket, rows)` once for every bucket that has rows.

        Args:
            batches: rows of `schema` plus `bucket`: int32, in [0, num_buckets). All of them are read
                before the first call, so a source that fails leaves nothing done.
            by: the columns to sort the rows of a bucket by. The first names whose rows they are,
                the last numbers them in the order of the input.
            scratch: a local folder for spilling, and for what `work` likes to write.
            work: gets rows of `schema`, sorted, in chunks (at least one, none empty) that hold the
                rows of a user whole. Several calls may run at a time, in threads.

        Returns:
            What the calls returned, in ascending order of bucket, whichever came first.

        Raises:
            OSError: the disk that it spills to failed, or is full.
            Whatever `batches` or `work` raised, unchanged. Of several calls that would fail, the
            same one fails each time.
        """
        ...
