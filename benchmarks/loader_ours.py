"""Our loader on a table of the benchmark: whole epochs, at its default settings unless told."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.loader_data import BATCH, TRAITS, Data
from vlm_dagster import Projection, SequenceLoader
from vlm_dagster.loaders import Batch

__all__ = ["Ours"]


class Ours:
    """A loader that is kept open, as one is for a training run; each call is an epoch.

    Args:
        length: the newest so many events of each example.
        options: of `SequenceLoader`.
    """

    def __init__(self, data: Data, length: int, **options: Any) -> None:
        self.loader = SequenceLoader(
            data.pointers(), {"events": Projection(TRAITS, max_length=length)}, BATCH, **options
        )

    def first(self) -> Batch:
        """The first batch of an epoch."""
        return next(iter(self.loader))

    def examples_per_s(self) -> float:
        start = time.perf_counter()
        seen = 0
        for batch in self.loader:
            seen += batch.batch_size
        return seen / (time.perf_counter() - start)

    def bytes_moved(self) -> int:
        """Of an epoch's tensors: what goes to a device."""
        return sum(batch.num_bytes for batch in self.loader)
