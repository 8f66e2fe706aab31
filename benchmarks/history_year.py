"""The table that most figures of `make bench-history` are about: 400 days of a heavy-tailed group.

Rates are lognormal over users. `compact()` is called after every 8th day, as a schedule would.
The version after day 365 is what is read.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from benchmarks.data import FIRST_DAY, GRID, day
from vlm_dagster import FeatureGroup, HistoryStore, Trait

DAYS, YEAR, COMPACT_EVERY = 400, 365, 8
EARLY, LATE = range(5, 15), range(DAYS - 10, DAYS)
COMPARED = {*EARLY, *LATE}
ITEMS, AUTHORS, CATEGORIES, ACTIONS = 1_000_000, 50_021, 97, 4
GROUP = FeatureGroup(
    "year",
    [
        Trait("item_id", pa.int64()),
        Trait("author_id", pa.int64()),
        Trait("category", pa.int16()),
        Trait("action", pa.int8()),
        Trait("dwell", pa.float32()),
        Trait("query_id", pa.int32()),
        Trait("surface", pa.int8()),
        Trait("price", pa.float32()),
    ],
)
FOUR = ["item_id", "author_id", "category", "dwell"]
# What is beside the columns of the event.
EXTRA = ("query_id", "surface", "price")


@dataclass(frozen=True)
class Shape:
    """How large: users, their mean number of events over a year, buckets, newest events read."""

    users: int
    mean: int
    buckets: int
    newest: int


FULL = Shape(users=1_000, mean=16_000, buckets=2, newest=256)
QUICK = Shape(users=1_000, mean=6_000, buckets=1, newest=128)


def rates(shape: Shape) -> npt.NDArray[np.float64]:
    """[users] events a day: lognormal, at least 100 a year where the mean is 16,000."""
    totals = np.random.default_rng(0).lognormal(0, 1.5, shape.users)
    return np.asarray(np.maximum(totals * shape.mean / totals.mean(), shape.mean / 160) / YEAR)


def events_of_day(number: int, per_day: npt.NDArray[np.float64]) -> pa.Table:
    """The events of one day in order of time."""
    rng = np.random.default_rng([1, number])
    counts = rng.poisson(per_day)
    size = int(counts.sum())
    users = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    window = GRID.at(FIRST_DAY + number)
    times = np.sort(rng.integers(window.start_us, window.end_us, size))
    items = (ITEMS * rng.random(size) ** 3).astype(np.int64)
    return pa.table(
        {
            "user_id": users,
            "event_id": np.arange(size) + number * 1_000_000_000,
            "event_time": pa.array(times, pa.timestamp("us", "UTC")),
            "item_id": items,
            "author_id": items % AUTHORS,
            "category": (items % CATEGORIES).astype(np.int16),
            "action": rng.integers(0, ACTIONS, size).astype(np.int8),
            "dwell": rng.gamma(2.0, 10.0, size).astype(np.float32),
            "query_id": rng.integers(0, 1_000_000, size).astype(np.int32),
            "surface": rng.integers(0, 8, size).astype(np.int8),
            "price": rng.gamma(2.0, 10.0, size).astype(np.float32),
        }
    )


def build(uri: str, shape: Shape) -> dict[str, Any]:
    """Seal and compact 400 days; returns the seconds of each seal (opening the store included),
    the events sealed and rewritten, and the version after a year."""
    store = HistoryStore.create(uri, GROUP, num_buckets=shape.buckets)
    per_day = rates(shape)
    seconds: list[float] = []
    sealed = rewritten = version = 0
    compacting = 0.0
    for number in range(DAYS):
        table = events_of_day(number, per_day)
        start = time.perf_counter()
        # The days that are compared are sealed as a new process would: nothing known of the log.
        fresh = number in COMPARED
        sealed += (HistoryStore.open(uri) if fresh else store).seal(day(number), table).num_events
        seconds.append(time.perf_counter() - start)
        if (number + 1) % COMPACT_EVERY == 0 or number + 1 in (YEAR, DAYS):
            start = time.perf_counter()
            report = store.compact()
            compacting += time.perf_counter() - start
            rewritten += report.num_events_rewritten
            if number + 1 == YEAR:
                version = report.version
    return {
        "seconds": seconds,
        "sealed": sealed,
        "rewritten": rewritten,
        "compact_seconds": compacting,
        "version": version,
    }
