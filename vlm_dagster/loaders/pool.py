"""A pool in memory: units whose examples are shuffled with each other, and the order they come in.

The order follows from (seed, epoch, pool) and from what the examples themselves say: every rank, and
every run that resumes, finds the same one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vlm_dagster.hashing import run_lengths
from vlm_dagster.loaders.materialize import UnitData
from vlm_dagster.loaders.options import OrderOptions
from vlm_dagster.loaders.schedule import Pieces

__all__ = ["ExampleKeys", "PoolData", "dealt", "order_of"]

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ExampleKeys:
    """What the order of examples depends on, of P examples in file order.

    Attributes:
        user_ends: [U] where each user's examples end.
        request_time: [P] UTC microseconds.
        tokens: [P] events of each example, over all groups, as the model sees them.
        flops: [P] the same, each sequence weighted by its length.
    """

    user_ends: I64
    request_time: I64
    tokens: I64
    flops: I64

    @classmethod
    def of(
        cls,
        user_ids: pa.Array,
        request_time: pa.Array,
        lengths: Mapping[str, I64],
        balance_length: int,
    ) -> ExampleKeys:
        """From the examples' columns.

        Args:
            lengths: per group, [P] events that the model sees.
        """
        counts = run_lengths(user_ids)[1] if len(user_ids) else np.zeros(0, np.int64)
        zero = np.zeros(len(user_ids), np.int64)
        return cls(
            np.cumsum(counts),
            np.asarray(request_time.cast(pa.int64())),
            sum(lengths.values(), zero),
            sum((v * (v + balance_length) for v in lengths.values()), zero),
        )

    @classmethod
    def unknown(cls, num_examples: int) -> ExampleKeys:
        """Of examples that cannot be read."""
        zero = np.zeros(num_examples, np.int64)
        return cls(np.array([num_examples]), zero, zero, zero)

    @classmethod
    def joined(cls, parts: Sequence[ExampleKeys]) -> ExampleKeys:
        bases = np.cumsum([0, *(len(part.tokens) for part in parts)])
        ends = [part.user_ends + base for part, base in zip(parts, bases, strict=False)]
        return cls(
            np.concatenate(ends),
            np.concatenate([part.request_time for part in parts]),
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.flops for part in parts]),
        )


def order_of(options: OrderOptions, epoch: int, number: int, keys: ExampleKeys) -> I64:
    """[P] the order in which the examples of pool `number` come."""
    num_examples = len(keys.tokens)
    if options.order == "stored":
        return np.arange(num_examples)
    if options.order == "time":
        return np.argsort(keys.request_time, kind="stable")
    key = np.random.SeedSequence([options.seed, epoch, number, 1])
    rng = np.random.Generator(np.random.Philox(key))
    if options.mix:
        return rng.permutation(num_examples)
    users = rng.permutation(len(keys.user_ends))
    starts = np.append(0, keys.user_ends[:-1])[users]
    counts = keys.user_ends[users] - starts
    done = np.cumsum(counts) - counts
    return np.asarray(np.arange(num_examples) + np.repeat(starts - done, counts), np.int64)


def dealt(order: I64, cost: I64, slots: Pieces) -> I64:
    """The same examples, dealt to the batches of a pool so that these cost about the same: the
    dearest first, to and fro.

    Args:
        order: [P] the examples; those of equal cost are dealt in this order.
        cost: [P] by example.
        slots: the rows of the pool that each batch gets.
    """
    sizes = slots.sizes
    turn = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    slot = np.repeat(np.arange(len(sizes)), sizes)
    # A batch that takes only some of its examples from this pool takes part in rounds all along, or
    # it would get the dearest ones.
    each = np.repeat(sizes, sizes)
    at_round = ((2 * turn + 1) * int(sizes.max(initial=0))) // np.maximum(2 * each, 1)
    to_and_fro = np.where(at_round % 2 == 0, slot, -slot)
    receives = np.lexsort((to_and_fro, at_round))
    places = (np.repeat(slots.first, sizes) + turn)[receives]
    found = np.empty_like(order)
    found[places] = order[np.argsort(-cost[order], kind="stable")]
    return found


class PoolData:
    """A pool: units in memory, and the order in which their examples come.

    Args:
        units: in the order of the plan; None for one that is left out.
        planned: how many examples each unit has in the plan.
        order: [P] numbers of examples, counted over all units.
    """

    def __init__(
        self, units: Sequence[UnitData | None], planned: Sequence[int], order: I64
    ) -> None:
        self._units = units
        self._order = order
        self._bases = np.cumsum([0, *planned])

    def rows(self, first: int, end: int) -> list[tuple[UnitData, I64]]:
        """The examples at places `[first, end)` of the order, as rows of their units. Within a batch,
        examples of one unit stand together, in file order: a batch is a set, and so each unit is
        gathered from once, from its beginning to its end. Those that are left out are not among them."""
        chosen = np.sort(self._order[first:end])
        bounds = np.searchsorted(chosen, self._bases)
        found = []
        for number in np.flatnonzero(np.diff(bounds)).tolist():
            unit = self._units[number]
            if unit is None:
                continue
            rows = chosen[bounds[number] : bounds[number + 1]] - self._bases[number]
            found.append((unit, rows if unit.kept is None else rows[unit.kept[rows]]))
        return found
