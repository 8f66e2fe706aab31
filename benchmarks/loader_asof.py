"""The sequences of each batch found by a join with the events as of each example's time, in Polars:
what one writes without a store of histories. The events of the examples' users lie in memory already,
sorted; the join finds the last event before each example, and its sequence are the rows up to there."""

from __future__ import annotations

import time

import numpy as np
import polars as pl
import torch

from benchmarks.loader_data import BATCH, TRAITS, Data

__all__ = ["AsOf"]


class AsOf:
    """Every batch of an epoch joined by itself, or of the first so many batches."""

    def __init__(self, data: Data, length: int, most: int) -> None:
        examples = data.examples.first(most)
        table = data.events_of(np.unique(examples.user_ids))
        self._events = pl.DataFrame(pl.from_arrow(table)).with_row_index("row")
        self._keys = self._events.select("user_id", "event_time", "row").with_columns(
            first=pl.col("row").min().over("user_id")
        )
        self._length = length
        rows = np.arange(len(examples))
        self._batches = [
            pl.DataFrame(
                {"user_id": examples.user_ids[part], "request_time": examples.times[part]}
            ).with_columns(pl.col("request_time").cast(pl.Datetime("us", "UTC")))
            for part in np.array_split(rows, range(BATCH, len(rows), BATCH))
        ]
        self._num_examples = len(rows)

    def examples_per_s(self) -> float:
        start = time.perf_counter()
        for batch in self._batches:
            self._join(batch)
        return self._num_examples / (time.perf_counter() - start)

    def _join(self, batch: pl.DataFrame) -> None:
        users = batch["user_id"].unique()
        keys = self._keys.filter(pl.col("user_id").is_in(users.implode()))
        found = batch.sort("request_time").join_asof(
            keys.sort("event_time"),
            left_on="request_time",
            right_on="event_time",
            by="user_id",
            strategy="backward",
            allow_exact_matches=False,
            check_sortedness=False,
        )
        last = found["row"].to_numpy().astype(np.int64) + 1
        first = np.maximum(last - self._length, found["first"].to_numpy().astype(np.int64))
        lengths = last - first
        ends = np.cumsum(lengths)
        rows = np.repeat(last - ends, lengths) + np.arange(int(ends[-1]))
        sequences = self._events.select(TRAITS)[rows]
        for name in TRAITS:
            torch.from_numpy(sequences[name].to_numpy(writable=True))
        torch.from_numpy(np.append(0, ends))
