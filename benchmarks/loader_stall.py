"""How long a consumer waits that does nothing but sleep for the time of a training step."""

from __future__ import annotations

import time

from benchmarks.loader_ours import Ours

__all__ = ["SLEEPS_MS", "starved_share"]

SLEEPS_MS = (5, 20, 80)


def starved_share(ours: Ours, sleep_ms: float, max_steps: int) -> float:
    """The share of the time that a consumer waited, from its second batch on: the first is start-up.

    Over one epoch, or its first so many steps.
    """
    batches = iter(ours.loader)
    next(batches)
    waited = 0.0
    start = time.perf_counter()
    for _ in range(max_steps):
        time.sleep(sleep_ms / 1e3)
        asked = time.perf_counter()
        if next(batches, None) is None:
            break
        waited += time.perf_counter() - asked
    return waited / (time.perf_counter() - start)
