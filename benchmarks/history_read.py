"""Reading the year table: decoding all of it, and only the newest events of everybody."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.history_year import FOUR
from benchmarks.measure import in_turn, peak_rss_mb, timed
from vlm_dagster import HistoryStore, Projection
from vlm_dagster.hashing import bucket_of
from vlm_dagster.history import ArenaBuffers
from vlm_dagster.history.snapshot import Snapshot


def units(snapshot: Snapshot) -> list[pa.Array]:
    """A unit is all users of a bucket."""
    users = snapshot.user_ids()
    buckets = bucket_of(users, snapshot.num_buckets)
    return [users.filter(pa.array(buckets == bucket)) for bucket in np.unique(buckets)]


def decode(uri: str, version: int, rounds: int) -> dict[str, Any]:
    """Events a second into arenas, unit by unit, 4 traits, one thread, warm, against a bare
    `ParquetFile.read_row_groups` of the same files and columns (its best case: no checksums).

    A unit's memory is used again for the next one, as a loader does. Beside it: with fresh memory for
    each, with two threads, the first time (footers, checksums and first touch of memory included),
    and how much memory the first time took beyond what the process had before.
    """
    pa.set_cpu_count(1)
    snapshot = HistoryStore.open(uri).snapshot(version)
    parts = units(snapshot)
    paths = [str(Path(uri, path)) for path in snapshot.files()["path"].to_pylist()]
    buffers = ArenaBuffers()

    def ours(threads: int = 1, memory: ArenaBuffers | None = buffers) -> None:
        for part in parts:
            index = snapshot.index_of(part)
            zero = np.zeros_like(index.num_events)
            index.read(FOUR, zero, index.num_events, buffers=memory, threads=threads)

    def bare() -> None:
        for path in paths:
            file = pq.ParquetFile(path, pre_buffer=False)
            groups = list(range(file.num_row_groups))
            file.read_row_groups(groups, columns=FOUR, use_threads=False)

    before = peak_rss_mb()
    cold = timed(ours)
    peak = peak_rss_mb() - before
    bare()
    arms = {
        "ours": lambda: timed(ours),
        "bare": lambda: timed(bare),
        "two": lambda: timed(lambda: ours(threads=2)),
        "fresh": lambda: timed(lambda: ours(memory=None)),
    }
    seconds = in_turn(arms, rounds)
    events = snapshot.num_events
    largest = max(int(snapshot.count(part).sum()) for part in parts)
    row = sum(snapshot.group.event_schema.field(name).type.bit_width for name in FOUR) // 8
    return {
        "events_per_s": events / seconds["ours"],
        "bare_events_per_s": events / seconds["bare"],
        "two_threads_events_per_s": events / seconds["two"],
        "fresh_events_per_s": events / seconds["fresh"],
        "cold_events_per_s": events / cold,
        "share": seconds["bare"] / seconds["ours"],
        "peak_mb": peak,
        "arena_mb": largest * row / 1e6,
    }


def newest(uri: str, version: int, length: int, traits: list[str] | None) -> dict[str, float]:
    """Rows and bytes read for the newest events of every user, unit by unit, from a store opened
    for it; needed bytes are needed rows times the mean stored bytes of a row of these columns."""
    store = HistoryStore.open(uri)
    snapshot = store.snapshot(version)
    projection = Projection(traits=traits, max_length=length)
    parts = units(snapshot)
    snapshot.stats.counts_bytes = True
    start = time.perf_counter()
    needed = sum(snapshot.read(part, projection).num_events for part in parts)
    seconds = time.perf_counter() - start
    stats = snapshot.stats
    stored = column_bytes(uri, snapshot)
    columns = projection.columns(snapshot.group)
    row = sum(stored[name] for name in columns) / snapshot.num_events
    return {
        "rows_needed": needed,
        "rows_decoded": stats.rows_decoded,
        "bytes_needed": needed * row,
        "data_bytes": stats.data_bytes,
        "footer_bytes": stats.footer_bytes,
        "seconds": seconds,
    }


def column_bytes(uri: str, snapshot: Snapshot) -> dict[str, int]:
    """Stored bytes of each column's pages, and under "" everything else in the files."""
    found: dict[str, int] = {"": 0}
    files = snapshot.files()
    for path in files["path"].to_pylist():
        metadata = pq.read_metadata(Path(uri, path))
        for g in range(metadata.num_row_groups):
            for i in range(metadata.num_columns):
                chunk = metadata.row_group(g).column(i)
                name = chunk.path_in_schema
                found[name] = found.get(name, 0) + chunk.total_compressed_size
    found[""] = sum(files["size_bytes"].to_pylist()) - sum(found.values())
    return found
