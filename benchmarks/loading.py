"""Loading an epoch: ours, against fat rows as the industry writes them, and against the floor.

All arms read the same traits into the same jagged tensors in batches of the same size:

- `ours`: SequenceLoader, checksums verified, and with verification off;
- `fat_time`: fat rows in order of time, snappy (as usually written);
- `fat_user`: fat rows clustered by user, zstd (the honest opponent);
- `floor`: a bare loop that decodes each needed event once and copies it once an example.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.data import GRID, GROUP, day, even_history
from benchmarks.measure import in_turn, timed
from vlm_dagster import HistoryStore, PointerDataset, Projection, SequenceLoader
from vlm_dagster.loaders.materialize import materialize
from vlm_dagster.loaders.plan import make_plan
from vlm_dagster.sealed.gathering import gather

TRAITS = ["item_id", "author_id", "category", "dwell_seconds"]
BATCH = 256
DAYS = 8


def build(
    folder: Path, num_users: int, length: int, per_user: int
) -> tuple[HistoryStore, PointerDataset]:
    """Histories of `length` events a user, and that many examples of each on the last day."""
    store = HistoryStore.create(folder / "history", GROUP, num_buckets=4)
    for key, table in even_history(num_users, length, DAYS):
        store.seal(key, table)
    pointers = PointerDataset.create(
        folder / "pointers",
        ["events"],
        request="request_time",
        max_length=length,
        num_buckets=4,
    )
    window = GRID.parse(day(DAYS - 1))
    rng = np.random.default_rng(1)
    num = num_users * per_user
    requests = pa.table(
        {
            "user_id": np.repeat(np.arange(num_users), per_user),
            "request_id": np.arange(num),
            "request_time": pa.array(
                rng.integers(window.end_us - 3_600_000_000, window.end_us, num),
                pa.timestamp("us", "UTC"),
            ),
        }
    )
    pointers.seal(window.key, requests, {"events": store.snapshot()})
    return store, pointers


def load(pointers: PointerDataset, length: int, verify: str) -> None:
    loader = SequenceLoader(
        pointers.ref(),
        {"events": Projection(TRAITS, max_length=length)},
        BATCH,
        verify=verify,  # type: ignore[arg-type]
        events_per_unit=2_000_000,
        mix=1,
    )
    for batch in loader:
        assert batch.batch_size


def write_fat(pointers: PointerDataset, length: int, folder: Path) -> dict[str, int]:
    """The same examples with their sequences copied in; bytes of each layout."""
    loader = SequenceLoader(
        pointers.ref(),
        {"events": Projection(TRAITS, max_length=length)},
        BATCH,
        order="stored",
        verify="off",
    )
    tables = []
    for batch in loader:
        sequence = batch.sequences["events"]
        columns: dict[str, Any] = {
            name: pa.array(batch.examples[name].numpy()) for name in ("user_id", "request_time")
        }
        offsets = pa.array(sequence.offsets.numpy().astype(np.int32))
        for name in TRAITS:
            columns[name] = pa.ListArray.from_arrays(
                offsets, pa.array(sequence.values[name].numpy())
            )
        tables.append(pa.table(columns))
    by_user = pa.concat_tables(tables)
    order = np.argsort(by_user["request_time"].to_numpy(), kind="stable")
    pq.write_table(by_user, folder / "fat_user.parquet", compression="zstd", row_group_size=BATCH)
    size = {"fat_user": (folder / "fat_user.parquet").stat().st_size}
    with pq.ParquetWriter(folder / "fat_time.parquet", by_user.schema, compression="snappy") as out:
        for start in range(0, len(order), BATCH):
            out.write_table(by_user.take(pa.array(order[start : start + BATCH])))
    size["fat_time"] = (folder / "fat_time.parquet").stat().st_size
    return size


def load_fat(path: Path) -> None:
    file = pq.ParquetFile(path)
    for batch in file.iter_batches(batch_size=BATCH, columns=["user_id", *TRAITS]):
        for name in TRAITS:
            column = batch.column(name)
            torch.from_numpy(column.flatten().to_numpy().copy())
            torch.from_numpy(np.asarray(column.offsets.to_numpy()).copy())


def floor(store: HistoryStore, pointers: PointerDataset, length: int) -> float:
    """Seconds to decode the needed events once and copy them once, nothing else."""
    snapshot = pointers.snapshot()
    projections = {"events": Projection(TRAITS, max_length=length)}
    histories = {"events": store.snapshot()}
    plan = make_plan(
        snapshot,
        histories,
        projections,
        examples_per_unit=4096,
        events_per_unit=2_000_000,
        verify=False,
        drop_gone=False,
    )
    start = time.perf_counter()
    for unit in plan.units:
        data = materialize(
            snapshot,
            histories,
            projections,
            unit.bucket,
            plan.users_of(unit),
            columns=["request_time"],
            verify=False,
        )
        arena = data.arenas["events"]
        for at in range(0, data.num_examples, BATCH):
            rows = slice(at, at + BATCH)
            for values in arena.columns.values():
                gather(values, arena.starts[rows], arena.lengths[rows])
    return time.perf_counter() - start


def run(num_users: int, history: int, length: int, per_user: int, rounds: int) -> dict[str, Any]:
    """Examples a second of every arm, bytes stored, and ours against the best fat rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store, pointers = build(folder, num_users, history, per_user)
        fat_bytes = write_fat(pointers, length, folder)
        seconds = in_turn(
            {
                "ours": lambda: timed(lambda: load(pointers, length, "always")),
                "ours_unverified": lambda: timed(lambda: load(pointers, length, "off")),
                "fat_time": lambda: timed(lambda: load_fat(folder / "fat_time.parquet")),
                "fat_user": lambda: timed(lambda: load_fat(folder / "fat_user.parquet")),
                "floor": lambda: floor(store, pointers, length),
            },
            rounds,
        )
        own_bytes = sum(
            sum(table.files()["size_bytes"].to_pylist())
            for table in (store.snapshot(), pointers.snapshot())
        )
    num = num_users * per_user
    rates = {f"{arm}_examples_per_s": num / value for arm, value in seconds.items()}
    best_fat = max(rates["fat_time_examples_per_s"], rates["fat_user_examples_per_s"])
    return {
        "users": num_users,
        "history": history,
        "length": length,
        "examples_per_user": per_user,
        **rates,
        "ours_events_per_s": rates["ours_examples_per_s"] * length,
        "against_best_fat": rates["ours_examples_per_s"] / best_fat,
        "share_of_floor": rates["ours_examples_per_s"] / rates["floor_examples_per_s"],
        "stored_bytes": own_bytes,
        **{f"{arm}_bytes": size for arm, size in fat_bytes.items()},
    }
