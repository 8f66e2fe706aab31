"""What shuffling more widely costs in speed, and what it gives in randomness.

For each `mix`, over one epoch: examples a second; the distinct users of a batch, relative to a batch
drawn at random from the epoch; and how far apart in the epoch examples come that are stored next to each
other, relative to a random order. 1 is as random as can be in both. (How far an example travels from its
own stored place says nothing: units come in random order at any setting.)
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.loader_data import BATCH, Data, Shape
from benchmarks.loader_ours import Ours
from benchmarks.measure import in_turn

__all__ = ["MIXES", "Point", "curve"]

I64 = npt.NDArray[np.int64]

MIXES = (0, 1, 2, 4, 8, 16, 32, 64)

# So that `mix` alone decides how wide a pool is.
_EVENTS_PER_POOL = 1 << 40


@dataclass(frozen=True)
class Point:
    """One setting of the knob.

    Attributes:
        distinct: users of a batch, relative to a random draw.
        apart: mean distance in the epoch of stored neighbours, relative to a random order.
    """

    mix: int
    examples_per_s: float
    distinct: float
    apart: float


def curve(folder: Path, shape: Shape, form: str, rounds: int) -> list[Point]:
    """The points of all settings on one table."""
    data = Data(folder, shape)
    loaders = {
        mix: Ours(
            data,
            shape.length,
            form=form,
            verify="off",
            mix=mix,
            events_per_pool=_EVENTS_PER_POOL,
        )
        for mix in MIXES
    }
    stored = Ours(data, shape.length, form="views", verify="off", order="stored")
    place = np.empty(len(data.examples), np.int64)
    place[np.concatenate([ids for ids, _ in _order(stored)])] = np.arange(len(place))
    found = {mix: _randomness(loader, place) for mix, loader in loaders.items()}
    rates = in_turn({str(mix): loader.examples_per_s for mix, loader in loaders.items()}, rounds)
    return [Point(mix, rates[str(mix)], *found[mix]) for mix in MIXES]


def _order(ours: Ours) -> list[tuple[I64, I64]]:
    """The request ids and the users of each batch of an epoch."""
    return [
        (batch.examples["request_id"].numpy().copy(), batch.examples["user_id"].numpy().copy())
        for batch in ours.loader
    ]


def _randomness(ours: Ours, place: I64) -> tuple[float, float]:
    batches = _order(ours)
    full = [users for _, users in batches if len(users) == BATCH]
    distinct = statistics.mean(len(np.unique(users)) for users in full)
    everyone = np.concatenate([users for _, users in batches])
    expected = _distinct_at_random(np.unique(everyone, return_counts=True)[1], len(everyone))
    ids = np.concatenate([ids for ids, _ in batches])
    comes = np.empty(len(place), np.int64)
    comes[place[ids]] = np.arange(len(ids))
    apart = np.abs(np.diff(comes)).mean()
    return distinct / expected, float(apart) / (len(place) / 3)


def _distinct_at_random(counts: I64, total: int) -> float:
    """The users expected in a batch drawn without replacement from an epoch in which each has so many
    examples."""
    drawn = np.arange(BATCH)
    # The share of draws that miss a user: the product of the chances that each example is another's.
    missed = {
        count: float(np.prod((total - count - drawn) / (total - drawn)))
        for count in np.unique(counts).tolist()
    }
    return float(sum(1 - missed[count] for count in counts.tolist()))
