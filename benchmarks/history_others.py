"""The same events in other layouts: a plain sorted Parquet file, a Lance data set; and ours beside them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.history_read import units
from benchmarks.history_year import FOUR
from benchmarks.measure import in_turn, timed
from vlm_dagster import HistoryStore, Projection
from vlm_dagster.history.snapshot import Snapshot

LANCE_PYTHON = "VLM_BENCH_LANCE_PYTHON"


def sorted_rows(snapshot: Snapshot) -> pa.Table:
    """`user_id` and the traits of all events, by user and then by time."""
    tables = []
    for users in units(snapshot):
        part = snapshot.read(users)
        owners = part.user_ids.take(pa.array(np.repeat(np.arange(len(part.lengths)), part.lengths)))
        tables.append(pa.table({"user_id": owners, **part.columns}))
    return pa.concat_tables(tables).sort_by("user_id")


def ours(uri: str, version: int, length: int) -> dict[str, float]:
    """Seconds for the newest events of everybody and of ten users, opening the table included; and of
    ten users once more."""
    pa.set_cpu_count(1)
    snapshot = HistoryStore.open(uri).snapshot(version)
    users = snapshot.user_ids()
    ten = users.take(pa.array(np.arange(0, len(users), max(len(users) // 10, 1))))
    projection = Projection(traits=FOUR, max_length=length)

    def newest() -> None:
        opened = HistoryStore.open(uri).snapshot(version)
        for part in units(opened):
            opened.read(part, projection)

    def few() -> None:
        HistoryStore.open(uri).snapshot(version).read(ten, projection)

    arms = {
        "ours_newest_s": lambda: timed(newest),
        "ours_ten_users_s": lambda: timed(few),
        "ours_ten_users_again_s": lambda: timed(lambda: snapshot.read(ten, projection)),
    }
    return in_turn(arms, 5)


def plain(uri: str, version: int, length: int, folder: str) -> dict[str, float]:
    """The same events as a plain Parquet file sorted by (user, time), zstd and LZ4: bytes an event,
    and seconds to scan the four traits, and to find the newest events of every user and of ten
    (only row groups whose user statistics match are read: for everybody, that is all of them)."""
    pa.set_cpu_count(1)
    table = sorted_rows(HistoryStore.open(uri).snapshot(version))
    ids = pa.array(np.unique(table["user_id"].to_numpy()))
    ten = ids.take(pa.array(np.arange(0, len(ids), max(len(ids) // 10, 1)))).to_numpy()
    found: dict[str, float] = {}
    for codec in ("zstd", "lz4"):
        path = str(Path(folder, f"{codec}.parquet"))
        pq.write_table(table, path, compression=codec, row_group_size=65_536)

        def scan(columns: list[str], users: Any = None, path: str = path) -> pa.Table:
            file = pq.ParquetFile(path, pre_buffer=False)
            groups = list(range(file.num_row_groups))
            if users is not None:
                sides = [file.metadata.row_group(g).column(0).statistics for g in groups]
                groups = [
                    g for g in groups if ((users >= sides[g].min) & (users <= sides[g].max)).any()
                ]
            return file.read_row_groups(groups, columns=columns, use_threads=False)

        def tails(users: Any = None, scan: Any = scan) -> None:
            rows = scan(["user_id", *FOUR], users)
            owners = rows["user_id"].to_numpy()
            ends = np.append(np.flatnonzero(np.diff(owners)) + 1, len(owners))
            begins = np.maximum(ends - length, np.append(0, ends[:-1]))
            if users is not None:
                wanted = np.isin(owners[ends - 1], users)
                begins, ends = begins[wanted], ends[wanted]
            lengths = ends - begins
            at = np.repeat(begins - np.cumsum(lengths) + lengths, lengths)
            rows.take(pa.array(at + np.arange(len(at))))

        scan(FOUR)
        seconds = in_turn(
            {
                "scan": lambda: timed(lambda: scan(FOUR)),
                "newest": lambda: timed(tails),
                "ten": lambda: timed(lambda: tails(ten)),
            },
            3,
        )
        found |= {
            f"{codec}_bytes": Path(path).stat().st_size / table.num_rows,
            f"{codec}_scan_events_per_s": table.num_rows / seconds["scan"],
            f"{codec}_newest_s": seconds["newest"],
            f"{codec}_ten_users_s": seconds["ten"],
        }
    return found | ours(uri, version, length)


def lance(uri: str, version: int, length: int, folder: str) -> dict[str, Any]:
    """The same of a Lance data set, by a Python that has `pylance`; see `lance_rows.py`."""
    rows = str(Path(folder, "rows.arrow"))
    table = sorted_rows(HistoryStore.open(uri).snapshot(version))
    with pa.ipc.new_file(rows, table.schema) as writer:
        writer.write_table(table)
    script = str(Path(__file__).with_name("lance_rows.py"))
    call = [os.environ[LANCE_PYTHON], script, rows, str(Path(folder, "lance")), str(length), *FOUR]
    done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
