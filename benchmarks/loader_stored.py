"""Bytes stored for 30 days of examples: fat rows of every day, and the history and its pointers."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.data import day
from benchmarks.fat_rows import LAYOUTS, write
from benchmarks.history_floor import floor_bits
from benchmarks.loader_data import GROUP, Examples, folder_bytes, history_day, requests_day
from vlm_dagster import HistoryStore, PointerDataset

__all__ = ["DAYS", "stored_bytes"]

DAYS = 30

# The usual one, and those that are small.
_LAYOUTS = ("by time, snappy", "by user, zstd", "by user, LZ4")


def stored_bytes(
    folder: Path, num_users: int, before: int, per_day: int, length: int, examples: int
) -> dict[str, int]:
    """Bytes of each layout, of ours, of all our files with the two logs, and of a perfect coder of the
    four traits, once an event.

    Args:
        before: events of each user before the 30 days, so that sequences are full from the first.
        per_day: events of each user and day.
        examples: of each user and day.
    """
    store = HistoryStore.create(str(folder / "history"), GROUP, num_buckets=1)
    pointers = PointerDataset.create(
        str(folder / "pointers"),
        [GROUP.name],
        request="request_time",
        max_length=length,
        num_buckets=1,
    )
    store.seal(day(0), history_day(0, num_users, before))
    for number in range(1, DAYS + 1):
        store.seal(day(number), history_day(number, num_users, per_day))
        requests = requests_day(number, num_users, examples)
        pointers.seal(day(number), requests, {GROUP.name: store.snapshot()})
        if number % 8 == 0:
            store.compact()
    store.compact()
    history, made = store.snapshot(), pointers.snapshot()
    sizes = {
        "history": _listed(history.files()),
        "pointers": _listed(made.files()),
        "every file": folder_bytes(folder),
    }
    sizes["ours"] = sizes["history"] + sizes["pointers"]
    lengths = np.full(num_users, before + DAYS * per_day, np.float64)
    bits = floor_bits(lengths, DAYS + 1)
    traits = sum(bits[name] for name in ("item_id", "author_id", "category", "dwell"))
    sizes["the four traits' entropy"] = int(traits / 8 * lengths.sum())
    for name in _LAYOUTS:
        sizes[name] = 0
        for sealed in made.windows:
            rows = Examples.of(made.only(sealed.window.key), history)
            with tempfile.TemporaryDirectory(dir=folder) as place:
                sizes[name] += write(rows, LAYOUTS[name], Path(place, "fat.parquet"))
    return sizes


def _listed(files: pa.Table) -> int:
    return int(np.sum(files["size_bytes"].to_numpy()))
