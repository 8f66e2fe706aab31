"""Reading the pools of one epoch: which units, whether they are verified, in which order they come."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from vlm_dagster.errors import CorruptFileError, LoaderError, VlmError
from vlm_dagster.loaders.lengths import Lengths
from vlm_dagster.loaders.materialize import UnitData
from vlm_dagster.loaders.options import OrderOptions
from vlm_dagster.loaders.plan import Plan, Pool
from vlm_dagster.loaders.pool import ExampleKeys, PoolData, dealt, order_of
from vlm_dagster.loaders.schedule import Pieces
from vlm_dagster.loaders.sources import UnitSource

__all__ = ["Dropped", "EpochReader", "Verify"]

Verify = Literal["always", "sampled", "off"]

_LOG = logging.getLogger("vlm_dagster.loader")

# Of the units, by chance from (seed, epoch, unit): in the long run every one is verified.
_SAMPLED_SHARE = 1 / 16
_MOST_NAMED = 10


class Dropped:
    """Examples that are left out because what they point at is damaged: how many of the batches that
    were formed, and why. Each unit is logged when it is first met."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reasons: dict[tuple[int, str], str] = {}
        self._num_examples = 0

    def found(self, unit: int, error: VlmError) -> None:
        """Something is wrong with examples of a unit."""
        key = unit, type(error).__name__
        with self._lock:
            known = key in self._reasons
            self._reasons[key] = str(error)
        if not known:
            _LOG.warning("examples are left out: %s", error)

    def count(self, num_examples: int) -> None:
        """So many examples are missing from a batch."""
        with self._lock:
            self._num_examples += num_examples

    def reset(self) -> None:
        with self._lock:
            self._reasons.clear()
            self._num_examples = 0

    def to_json(self) -> dict[str, Any]:
        """How many, and the first reasons."""
        with self._lock:
            reasons = list(dict.fromkeys(self._reasons.values()))
            return {"num_examples": self._num_examples, "reasons": reasons[:_MOST_NAMED]}


class EpochReader:
    """Reads the pools of an epoch; what the graph's reading stage runs.

    Args:
        pools: of the epoch, by number.
        lengths: of examples that cannot be read, so that all others come in the order planned.
        slots: which rows of a pool each batch gets, for dealing; None where nothing is dealt.
        bad: "fail" raises what reading raises; "drop" leaves damaged examples out and counts them.
    """

    def __init__(
        self,
        plan: Plan,
        pools: Sequence[Pool],
        source: UnitSource,
        options: OrderOptions,
        epoch: int,
        *,
        verify: Verify,
        bad: Literal["fail", "drop"],
        dropped: Dropped,
        lengths: Lengths,
        slots: Callable[[int], Pieces] | None,
    ) -> None:
        self._plan = plan
        self._pools = pools
        self._source = source
        self._options = options
        self._epoch = epoch
        self._verify = verify
        self._bad = bad
        self._dropped = dropped
        self._lengths = lengths
        self._slots = slots

    def units(self, pool: int) -> Sequence[int]:
        return self._pools[pool].units

    def read(self, unit: int) -> UnitData | None:
        it = self._plan.units[unit]
        try:
            data = self._source.read(it, self._plan.users_of(it), verify=self._verifies(unit))
        except CorruptFileError as error:
            if self._bad == "fail":
                raise
            self._dropped.found(unit, error)
            return None
        if data.bad is not None:
            if self._bad == "fail":
                raise data.bad
            self._dropped.found(unit, data.bad)
        if data.num_examples != it.num_examples:
            raise LoaderError(
                f"a unit of bucket {it.bucket} has {data.num_examples:,} examples, and "
                f"{it.num_examples:,} were planned: users were erased, or events dropped, since the "
                f"loader was made",
                "Make it anew from the same pin; its state says whether it can go on.",
            )
        return data

    def _verifies(self, unit: int) -> bool:
        if self._verify != "sampled":
            return self._verify == "always"
        key = np.random.SeedSequence([self._options.seed, self._epoch, unit, 2])
        return float(np.random.Generator(np.random.Philox(key)).random()) < _SAMPLED_SHARE

    def joined(self, pool: int, units: Sequence[UnitData | None]) -> PoolData:
        numbers = self._pools[pool].units
        planned = [self._plan.units[number].num_examples for number in numbers]
        keys = ExampleKeys.joined(
            [
                _keys(unit, self._options) if unit is not None else self._lengths.of(number)
                for unit, number in zip(units, numbers, strict=True)
            ]
        )
        order = order_of(self._options, self._epoch, pool, keys)
        if self._slots is not None:
            cost = keys.tokens if self._options.balance == "tokens" else keys.flops
            order = dealt(order, cost, self._slots(pool))
        return PoolData(units, planned, order)


def _keys(unit: UnitData, options: OrderOptions) -> ExampleKeys:
    return ExampleKeys.of(
        unit.examples["user_id"],
        unit.examples["request_time"],
        {group: arena.lengths for group, arena in unit.arenas.items()},
        options.balance_length,
    )
