"""Sealing one window from Parquet: check, bucket, sort, digest, write, commit; everything included.

The floor is what DuckDB alone needs to sort the same file by (user, time) into one Parquet file.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq

from benchmarks.data import GROUP, day, events
from benchmarks.measure import in_process, in_turn, peak_rss_mb
from vlm_dagster import HistoryStore


def seal(source: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        store = HistoryStore.create(folder, GROUP, num_buckets=16)
        start = time.perf_counter()
        sealed = store.seal(day(0), source)
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "bytes_per_event": sealed.num_bytes / sealed.num_events,
            "peak_rss_mb": peak_rss_mb(),
        }


def duckdb_sort(source: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        connection = duckdb.connect(":memory:", config={"memory_limit": "1GB", "threads": 2})
        start = time.perf_counter()
        connection.execute(
            f"COPY (SELECT * FROM read_parquet('{source}') ORDER BY user_id, event_time, event_id) "
            f"TO '{folder}/sorted.parquet' (FORMAT parquet, COMPRESSION lz4_raw)"
        )
        return {"seconds": time.perf_counter() - start}


def run(num_events: int, rounds: int) -> dict[str, Any]:
    """Events a second, the ratio to the floor, bytes an event and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        source = str(Path(folder, "events.parquet"))
        pq.write_table(events(0, 200_000, num_events), source)
        seen: dict[str, dict[str, float]] = {}

        def arm(name: str) -> float:
            seen[name] = in_process("benchmarks.sealing", name, source=source)
            return seen[name]["seconds"]

        seconds = in_turn(
            {"seal": lambda: arm("seal"), "duckdb_sort": lambda: arm("duckdb_sort")}, rounds
        )
    return {
        "events": num_events,
        "events_per_s": num_events / seconds["seal"],
        "floor_events_per_s": num_events / seconds["duckdb_sort"],
        "share_of_floor": seconds["duckdb_sort"] / seconds["seal"],
        "bytes_per_event": seen["seal"]["bytes_per_event"],
        "peak_rss_mb": seen["seal"]["peak_rss_mb"],
    }
