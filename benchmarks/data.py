"""Made-up events of a controlled shape: so many users, so long histories, so many examples."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from vlm_dagster import FeatureGroup, Trait, WindowGrid

GROUP = FeatureGroup(
    "events",
    [
        Trait("item_id", pa.int64()),
        Trait("author_id", pa.int64()),
        Trait("category", pa.int16()),
        Trait("action", pa.int8()),
        Trait("dwell_seconds", pa.float32()),
    ],
)
GRID = WindowGrid("daily")
FIRST_DAY = GRID.parse("2025-01-01").index


def day(number: int) -> str:
    """The key of the window that many days after the first."""
    return GRID.at(FIRST_DAY + number).key


def events(number: int, num_users: int, num_events: int, seed: int = 0) -> pa.Table:
    """Events of one day in order of time; activity over users is heavy-tailed."""
    window = GRID.at(FIRST_DAY + number)
    rng = np.random.default_rng([seed, number])
    users = (num_users * rng.random(num_events) ** 2).astype(np.int64)
    times = np.sort(rng.integers(window.start_us, window.end_us, num_events))
    items = (1_000_000 * rng.random(num_events) ** 3).astype(np.int64)
    return pa.table(
        {
            "user_id": users,
            "event_id": np.arange(num_events) + number * 1_000_000_000,
            "event_time": pa.array(times, pa.timestamp("us", "UTC")),
            "item_id": items,
            "author_id": items % 50_021,
            "category": (items % 97).astype(np.int16),
            "action": rng.integers(0, 4, num_events).astype(np.int8),
            "dwell_seconds": rng.gamma(2.0, 10.0, num_events).astype(np.float32),
        }
    )
