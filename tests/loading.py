"""A small data set and loaders over it: what tests of the loader read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
from strategies import day, events_of_day, history_of, many_events, request_table

from vlm_dagster import Batch, PointerDataset, Projection, SequenceLoader, Trait

EVENTS = many_events(seed=4, num_events=170, num_users=14)
IDS = sorted((e["user_id"], e["event_id"]) for e in EVENTS)
PROJECTION = {"ratings": Projection(["event_id"], max_length=20)}
# Small units and pools, so that batches straddle both; no thread unless a test asks for one.
OPTIONS: dict[str, Any] = {
    "batch_size": 12, "examples_per_unit": 12, "mix": 3, "lanes": 4, "seed": 7,
    "num_workers": 0, "prefetch": 0,
}  # fmt: skip
# All that changes what an epoch's order looks like.
ORDERS: dict[str, dict[str, Any]] = {
    "shuffled": {},
    "users together": {"mix": 0},
    "within units": {"mix": 1},
    "one lane": {"lanes": 1},
    "stored": {"order": "stored"},
    "by time": {"order": "time"},
    "by tokens": {"max_tokens": 90},
    "by tokens and time": {"max_tokens": 90, "order": "time"},
    "balanced tokens": {"balance": "tokens"},
    "balanced flops": {"balance": "flops", "balance_length": 4},
    "dropping": {"uneven": "drop"},
    "repeating": {"uneven": "repeat"},
    "padding": {"uneven": "pad"},
}

Content = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], int]


def pointers_in(folder: Path, num_days: int = 4) -> PointerDataset:
    """Every event of the first days is asked for at its own instant; labels count the requests of a day."""
    store = history_of(folder / "history", EVENTS, num_buckets=3)
    dataset = PointerDataset.create(
        folder / "pointers", ["ratings"], [Trait("label", pa.float64())], num_buckets=3
    )
    for number in range(num_days):
        asked = events_of_day(EVENTS, number)
        table = request_table(asked, pa.int64(), ["user_id", "event_id"], pa.int64())
        labels = pa.array([float(i) for i in range(len(asked))], pa.float64())
        dataset.seal(
            day(number), table.append_column("label", labels), {"ratings": store.snapshot()}
        )
    return dataset


def loader_of(pointers: PointerDataset, **options: Any) -> SequenceLoader:
    return SequenceLoader(pointers.ref(), PROJECTION, **{**OPTIONS, **options})


def content(batch: Batch) -> Content:
    """All that a batch says: users, requests, lengths, events, and how many examples are empty."""
    sequence = batch.sequences["ratings"]
    return (
        tuple(batch.examples["user_id"].tolist()),
        tuple(batch.examples["request_id"].tolist()),
        tuple(sequence.lengths.tolist()),
        tuple(sequence.values["event_id"].tolist()),
        batch.num_padding,
    )


def contents(loader: SequenceLoader) -> list[Content]:
    """The rest of the present epoch."""
    return [content(batch) for batch in loader]


def ids(batches: list[Content]) -> list[tuple[int, int]]:
    """User and request of every example, in order, without the empty ones."""
    return [
        pair
        for users, requests, _, _, num_padding in batches
        for pair in list(zip(users, requests, strict=True))[: len(users) - num_padding]
    ]
