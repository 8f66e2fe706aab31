"""Opening a snapshot of 100,000 files, and resolving a unit in it.

16 segments (what compaction leaves of some hundreds of windows) of 6,250 buckets. Only one bucket's
files exist: windows are sealed with its users alone. The other files are in the log only, with
statistics of the usual size and 0 rows, then comes a checkpoint. Timed in a fresh process, imports
done: `HistoryStore.open`, `snapshot()`, its segments, and reading the histories of 10 users.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pyarrow as pa
from deltalake import DeltaTable
from deltalake.transaction import AddAction, RemoveAction

from benchmarks.data import FIRST_DAY, GRID, GROUP, day, events
from vlm_dagster import HistoryStore
from vlm_dagster.hashing import bucket_of

SEGMENTS = 16


def build(uri: str, num_files: int) -> list[int]:
    """Make the table; returns the ids of ten users of the bucket whose files exist."""
    buckets = num_files // SEGMENTS
    store = HistoryStore.create(uri, GROUP, num_buckets=buckets)
    ids = np.arange(100 * buckets)
    users = ids[bucket_of(pa.array(ids), buckets) == 0][:50]
    for number in range(SEGMENTS):
        table = events(number, 1, 5_000)
        who = np.random.default_rng(number).choice(users, 5_000)
        store.seal(day(number), table.set_column(0, "user_id", pa.array(who)))
    handle = DeltaTable(uri)
    now_ms = int(time.time() * 1000)
    stats = {"user_id": 0, "event_time": "2025-01-01T00:00:00.000Z"}
    text = json.dumps({"numRecords": 0, "minValues": stats, "maxValues": stats, "nullCount": {}})
    adds: list[AddAction | RemoveAction] = []
    for number in range(SEGMENTS):
        segment = GRID.at(FIRST_DAY + number).segment
        for bucket in range(1, buckets):
            path = f"segment={segment}/bucket={bucket}/{bucket:064x}.parquet"
            place = {"segment": segment, "bucket": str(bucket)}
            adds.append(AddAction(path, 100_000, place, now_ms, True, text))
    handle.create_write_transaction(adds, "append", handle.schema(), ["segment", "bucket"])
    DeltaTable(uri).create_checkpoint()
    return [int(user) for user in users[:10]]


def resolve(uri: str, users: list[int]) -> dict[str, Any]:
    """Seconds to open, to list what the snapshot shows, and to read ten histories."""
    start = time.perf_counter()
    store = HistoryStore.open(uri)
    snapshot = store.snapshot()
    opened = time.perf_counter()
    assert len(snapshot.segments) == SEGMENTS
    listed = time.perf_counter()
    histories = snapshot.read(users)
    done = time.perf_counter()
    assert histories.num_events > 0
    return {
        "open_s": opened - start,
        "segments_s": listed - opened,
        "read_s": done - listed,
        "seconds": done - start,
        "files": snapshot.files().num_rows,
    }
