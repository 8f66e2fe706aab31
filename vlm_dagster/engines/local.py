"""The engine of one machine: threads, in a bounded amount of memory, spilling to disk.

Rows are put by bucket while they are read; then every bucket is sorted in memory and worked on,
several at a time. One that is too large for that is split by ranges of users first, and of these DuckDB
sorts what is still too large.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlm_dagster.engines.external import sorted_by_duckdb, whole_users
from vlm_dagster.engines.order import sorted_order
from vlm_dagster.engines.partition import MAX_PARTITIONS, Partition, Partitions

__all__ = ["LocalEngine"]

T = TypeVar("T")

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000**i for i, letter in enumerate("KMGT", 1)}
_UNITS |= {f"{letter}iB": 1024**i for i, letter in enumerate("KMGT", 1)}
# A bucket that is sorted in memory is there twice, with keys and whatever is made of its rows.
_COPIES = 2.5
# Of one that comes in pieces, the last piece is still being written when the next is sorted.
_COPIES_OF_PIECES = 4.0
# Batches that are read but not yet put by bucket.
_MAX_WAITING = 2
# Fewer rows are worked on sooner than threads are started.
_ROWS_WORTH_THREADS = 16_384


@dataclass(frozen=True)
class LocalEngine:
    """Sorts and works in this process.

    Attributes:
        memory_limit: what sorting may hold before it spills, e.g. "1500MB".
        threads: how many buckets are worked on at a time, as far as the memory suffices; None
            means one a core.
        in_memory_rows: inputs of at most so many rows, that fit into the memory, are sorted in
            one go.
    """

    memory_limit: str = "1500MB"
    threads: int | None = None
    in_memory_rows: int = 122_880

    def __post_init__(self) -> None:
        if _num_bytes(self.memory_limit) < 1:
            raise ValueError(f"memory_limit={self.memory_limit!r} is no memory at all")

    def map_buckets(
        self,
        batches: Iterator[pa.RecordBatch],
        schema: pa.Schema,
        by: Sequence[str],
        num_buckets: int,
        scratch: Path,
        work: Callable[[int, Iterator[pa.RecordBatch]], T],
    ) -> list[T]:
        threads = self.threads or os.cpu_count() or 1
        limit = _num_bytes(self.memory_limit)
        held: list[pa.RecordBatch] = []
        num_rows = num_bytes = 0
        for batch in batches:
            held.append(batch)
            num_rows += batch.num_rows
            num_bytes += batch.nbytes
            if num_rows > self.in_memory_rows or _COPIES * num_bytes > limit:
                break
        else:
            if not num_rows:
                return []
            rows = _sorted(held, _with_bucket(schema), ["bucket", *by])
            return _in_order(
                [partial(work, bucket, iter([part])) for bucket, part in _by_bucket([rows])],
                threads if num_rows >= _ROWS_WORTH_THREADS else 1,
            )
        parts = _partitioned(chain(held, batches), num_buckets, scratch, limit // 4)
        held.clear()
        budget = _Budget(limit - limit // 4)

        def run(part: Partition) -> list[T]:
            alone = part.bucket is not None
            order = by if alone else ["bucket", *by]
            fields = schema if alone else _with_bucket(schema)
            copies = _COPIES
            pieces = [part]
            if copies * part.num_bytes > budget.num_bytes:
                # Several pieces are in several stages at a time, and so may be several buckets.
                copies = _COPIES_OF_PIECES
                num = int(1.2 * copies * part.num_bytes * threads / budget.num_bytes) + 1
                pieces = part.split(order[0], min(num, MAX_PARTITIONS))
            wanted = [int(copies * piece.num_bytes) for piece in pieces]

            def chunks() -> Generator[pa.RecordBatch, None, None]:
                for piece, num_bytes in zip(pieces, wanted, strict=True):
                    if num_bytes <= budget.num_bytes:
                        yield _sorted(piece.take(), fields, order)
                        continue
                    found = sorted_by_duckdb(
                        piece.stream(),
                        fields,
                        order,
                        scratch,
                        memory_bytes=budget.num_bytes // 2,
                        threads=threads,
                    )
                    with contextlib.closing(found):
                        yield from whole_users(found, by[0])

            with budget.taken(max(wanted)):
                rows = chunks()
                with contextlib.closing(rows):
                    if part.bucket is not None:
                        return [work(part.bucket, rows)]
                    groups = groupby(_by_bucket(rows), key=itemgetter(0))
                    return [work(bucket, (rows for _, rows in group)) for bucket, group in groups]

        done = _in_order([partial(run, part) for part in parts], threads)
        return list(chain.from_iterable(done))


def _num_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if match is None or match[2] not in _UNITS:
        raise ValueError(f'{text!r} is not an amount of memory; one reads like "1.5GB" or "512MiB"')
    return int(float(match[1]) * _UNITS[match[2]])


def _with_bucket(schema: pa.Schema) -> pa.Schema:
    return schema.append(pa.field("bucket", pa.int32()))


class _Budget:
    """Bytes of memory shared by threads: who wants more than there are waits for others."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._left = num_bytes
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, num_bytes: int) -> Iterator[None]:
        """With so many of them; all, where that is more than there are."""
        taken = min(num_bytes, self.num_bytes)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= taken)
            self._left -= taken
        try:
            yield
        finally:
            with self._changed:
                self._left += taken
                self._changed.notify_all()


def _partitioned(
    batches: Iterable[pa.RecordBatch], num_buckets: int, scratch: Path, limit: int
) -> list[Partition]:
    """Reading goes on while what was read is put by bucket, by one other thread, in order."""
    parts = Partitions(scratch, num_buckets, limit)
    waiting: deque[Future[None]] = deque()
    try:
        with ThreadPoolExecutor(1) as pool:
            for batch in batches:
                waiting.append(pool.submit(parts.add, batch))
                if len(waiting) > _MAX_WAITING:
                    waiting.popleft().result()
            for future in waiting:
                future.result()
        return parts.finish()
    except BaseException:
        parts.close()
        raise


def _sorted(
    batches: Iterable[pa.RecordBatch], schema: pa.Schema, by: Sequence[str]
) -> pa.RecordBatch:
    table = pa.Table.from_batches(batches)
    keys = {name: _joined(table.column(name)) for name in by}
    order = pa.array(sorted_order(list(keys.values())))
    columns = []
    for name in schema.names:
        column = keys.pop(name) if name in keys else _joined(table.column(name))
        columns.append(pc.take(column, order, boundscheck=False))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _joined(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _by_bucket(chunks: Iterable[pa.RecordBatch]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Sorted rows, cut by their column `bucket` and without it."""
    for chunk in chunks:
        at = chunk.schema.get_field_index("bucket")
        buckets = chunk.column(at).to_numpy()
        rows = chunk.remove_column(at)
        edges = [0, *(np.flatnonzero(np.diff(buckets)) + 1).tolist(), len(buckets)]
        for begin, end in pairwise(edges):
            yield int(buckets[begin]), rows.slice(begin, end - begin)


def _in_order(tasks: Sequence[Callable[[], T]], threads: int) -> list[T]:
    """What the tasks return. Of those that fail, the first in order says why."""
    if min(threads, len(tasks)) < 2:
        return [task() for task in tasks]
    with ThreadPoolExecutor(min(threads, len(tasks))) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
