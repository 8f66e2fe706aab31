"""Peak memory of an epoch, in a process of its own; and the tables it is measured on, with histories of
very different lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.data import GRID, day, events
from benchmarks.loader_data import BATCH, GROUP, TRAITS
from vlm_dagster import HistoryStore, PointerDataset, Projection

__all__ = ["LONGEST", "build", "epoch"]

LONGEST = 70_000
_DAYS = 20
_MEAN = 5_000
_PER_USER = 4


def build(folder: str, num_events: int) -> dict[str, Any]:
    """A table of so many events in 20 daily windows: users' histories are lognormal, 5,000 events on
    average and 70,000 at most, and each user has four examples on the last day."""
    num_users = num_events // _MEAN
    rng = np.random.default_rng(7)
    chances = np.minimum(rng.lognormal(0, 1.2, num_users), 0.9 * LONGEST / _MEAN * np.exp(0.72))
    # Somebody has the longest history.
    chances[0] = chances.sum() * 0.99 * LONGEST / num_events
    chances /= chances.sum()
    buckets = max(8, num_events // 2_500_000)
    store = HistoryStore.create(str(Path(folder, "history")), GROUP, num_buckets=buckets)
    per_day = num_events // _DAYS
    longest = np.zeros(num_users, np.int64)
    for number in range(_DAYS):
        table = events(number, 1, per_day).drop_columns(["action"])
        users = rng.choice(num_users, per_day, p=chances)
        longest += np.bincount(users, minlength=num_users)
        table = table.set_column(0, "user_id", pa.array(users))
        at = table.schema.get_field_index("category")
        store.seal(
            day(number), table.set_column(at, "category", table["category"].cast(pa.int32()))
        )
    pointers = PointerDataset.create(
        str(Path(folder, "pointers")),
        [GROUP.name],
        request="request_time",
        max_length=LONGEST,
        num_buckets=buckets,
    )
    window = GRID.parse(day(_DAYS - 1))
    num = num_users * _PER_USER
    requests = pa.table(
        {
            "user_id": np.repeat(np.arange(num_users), _PER_USER),
            "request_id": np.arange(num),
            "request_time": pa.array(
                rng.integers(window.start_us, window.end_us, num), pa.timestamp("us", "UTC")
            ),
        }
    )
    pointers.seal(window.key, requests, {GROUP.name: store.snapshot()})
    return {"longest": int(longest.max())}


def epoch(folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """Run one epoch at the loader's default settings, other than given; for a fresh process."""
    from benchmarks.measure import peak_rss_mb
    from vlm_dagster import SequenceLoader

    before = peak_rss_mb()
    pointers = PointerDataset.open(str(Path(folder, "pointers"))).snapshot()
    loader = SequenceLoader(
        pointers, {GROUP.name: Projection(TRAITS, max_length=LONGEST)}, BATCH, **options
    )
    seen = num_events = 0
    for batch in loader:
        seen += batch.batch_size
        num_events += batch.sequences[GROUP.name].num_events
    return {"peak_mb": peak_rss_mb(), "before_mb": before, "examples": seen, "events": num_events}
