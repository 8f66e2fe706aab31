"""The plan of an epoch: which users are read together, in which order, by which rank.

Everything here follows from the footers' indices of the pinned files and from (seed, epoch), so
every rank and every resumed run makes the same plan without reading a row. Where an epoch stands is
plain arithmetic on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vlm_dagster.history import Snapshot
from vlm_dagster.loaders.readable import missing_examples
from vlm_dagster.pointers import PointerSnapshot
from vlm_dagster.schema import Projection

__all__ = ["Chunk", "Plan", "Unit", "make_plan"]

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Unit:
    """A range of users of one bucket, read and decoded together: those of the bucket's users
    (sorted) with numbers in `[first_user, end_user)`. `num_events` bounds those of any one group."""

    bucket: int
    first_user: int
    end_user: int
    num_examples: int
    num_events: int


@dataclass(frozen=True)
class Chunk:
    """Units whose examples are shuffled with each other. `number` seeds that shuffle."""

    number: int
    units: tuple[Unit, ...]

    @property
    def num_examples(self) -> int:
        return sum(unit.num_examples for unit in self.units)


@dataclass(frozen=True)
class Plan:
    """All units of the pinned examples, in file order, and the users of each bucket.

    Attributes:
        num_gone: examples left out, because events that they point at are gone.
    """

    units: tuple[Unit, ...]
    users: Mapping[int, pa.Array]
    num_gone: int = 0

    @property
    def num_examples(self) -> int:
        return sum(unit.num_examples for unit in self.units)

    def users_of(self, unit: Unit) -> pa.Array:
        """[U] the users of a unit, sorted."""
        return self.users[unit.bucket].slice(unit.first_user, unit.end_user - unit.first_user)

    def chunks(
        self, *, seed: int, epoch: int, shuffle: bool, units_per_chunk: int, events_per_chunk: int
    ) -> list[Chunk]:
        """All chunks of an epoch, in the global order that all ranks share.

        A chunk holds at most `units_per_chunk` units and `events_per_chunk` events, or one unit.
        """
        order = np.arange(len(self.units))
        if shuffle:
            order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(order)
        chunks: list[Chunk] = []
        held: list[Unit] = []
        num_events = 0
        for unit in (self.units[i] for i in order):
            full = len(held) == units_per_chunk or num_events + unit.num_events > events_per_chunk
            if held and full:
                chunks.append(Chunk(len(chunks), tuple(held)))
                held, num_events = [], 0
            held.append(unit)
            num_events += unit.num_events
        if held:
            chunks.append(Chunk(len(chunks), tuple(held)))
        return chunks


def make_plan(
    pointers: PointerSnapshot,
    histories: Mapping[str, Snapshot],
    projections: Mapping[str, Projection],
    *,
    examples_per_unit: int,
    events_per_unit: int,
    verify: bool,
    drop_gone: bool,
) -> Plan:
    """Cut the users of every bucket into units of bounded size.

    A unit holds at most `examples_per_unit` examples and `events_per_unit` events of any one group,
    or a single user.

    Args:
        verify: whether checksums will be verified, which needs all that a pointer spans.
        drop_gone: leave examples out whose events are gone.

    Raises:
        GoneError: there are such examples, and they are not to be left out.
    """
    units: list[Unit] = []
    num_gone = 0
    users: dict[int, pa.Array] = {}
    for bucket in range(pointers.num_buckets):
        found = pointers.users_of_bucket(bucket)
        if not len(found):
            continue
        users[bucket] = found
        index = pointers.bucket_index(bucket, found)
        num_examples = index.num_events
        missing = missing_examples(pointers, histories, projections, bucket, found, verify=verify)
        if missing is not None:
            if not drop_gone:
                raise missing.error
            num_examples = num_examples - missing.num_examples
            num_gone += int(missing.num_examples.sum())
        num_events = np.zeros(len(found), np.int64)
        for group, projection in projections.items():
            first = index.extreme(f"{group}_first", "min")
            if projection.max_length is not None:
                low = index.extreme(f"{group}_low", "min")
                first = np.maximum(first, low - projection.max_length)
            span = index.extreme(f"{group}_high", "max") - first
            num_events = np.maximum(num_events, span)
        units.extend(_cut(bucket, num_examples, num_events, examples_per_unit, events_per_unit))
    return Plan(tuple(units), users, num_gone)


def _cut(
    bucket: int, num_examples: I64, num_events: I64, max_examples: int, max_events: int
) -> list[Unit]:
    examples, events = np.cumsum(num_examples), np.cumsum(num_events)
    units = []
    first = 0
    while first < len(examples):
        examples_done = int(examples[first - 1]) if first else 0
        events_done = int(events[first - 1]) if first else 0
        end = min(
            int(np.searchsorted(examples, examples_done + max_examples, side="right")),
            int(np.searchsorted(events, events_done + max_events, side="right")),
        )
        end = max(end, first + 1)
        units.append(
            Unit(
                bucket,
                first,
                end,
                int(examples[end - 1]) - examples_done,
                int(events[end - 1]) - events_done,
            )
        )
        first = end
    return units
