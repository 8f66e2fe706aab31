"""The entropy of the year table's columns, in bits an event: what a perfect coder of each needs.

From the distributions that the events are drawn from, not from the sample, which would say too
little. Each column by itself, given which rows are whose: author and category follow from the item,
and event ids from all times together, but no column store uses that.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.history_year import ACTIONS, AUTHORS, CATEGORIES, ITEMS

F64 = npt.NDArray[np.float64]


def floor_bits(lengths: F64, days: int) -> dict[str, float]:
    """Bits an event by column. `lengths` is [users], each user's number of events."""
    edges = (np.arange(ITEMS + 1) / ITEMS) ** (1 / 3)
    items = np.diff(edges)
    ids = np.arange(ITEMS)
    # Gamma(2, 10) has an entropy of 2 + ln 10 - psi(2) nats; a float32 rounds to its spacing.
    dwell = np.random.default_rng(0).gamma(2.0, 10.0, 1_000_000).astype(np.float32)
    gamma = (2 + math.log(10) - 0.4227843351) / math.log(2)
    return {
        "event_time": _sorted_sample(lengths, days * 86_400e6),
        "item_id": _bits(items),
        "author_id": _bits(np.bincount(ids % AUTHORS, items)),
        "category": _bits(np.bincount(ids % CATEGORIES, items)),
        "action": math.log2(ACTIONS),
        "dwell": gamma - float(np.log2(np.spacing(dwell)).mean()),
        "event_id": _sorted_sample(lengths, float(lengths.sum())),
    }


def _bits(weights: npt.NDArray[Any]) -> float:
    chances = weights[weights > 0]
    return float(-(chances * np.log2(chances)).sum())


def _sorted_sample(lengths: F64, span: float) -> float:
    """Bits an event of each user's sorted uniform sample of a span: log2(span^n / n!)."""
    orders = sum(math.lgamma(n + 1) for n in lengths) / math.log(2)
    return math.log2(span) - orders / float(lengths.sum())
