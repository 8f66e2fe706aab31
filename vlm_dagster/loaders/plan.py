"""The plan of an epoch: which users are read together, and whose examples are shuffled together.

Everything here follows from the footers' indices of the pinned files and from (seed, epoch), so
every rank and every resumed run makes the same plan without reading a row.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vlm_dagster.errors import GoneError
from vlm_dagster.history import Snapshot
from vlm_dagster.history.arena import BucketIndex
from vlm_dagster.loaders.options import OrderOptions
from vlm_dagster.loaders.readable import missing_examples
from vlm_dagster.pointers import PointerSnapshot
from vlm_dagster.schema import Projection

__all__ = ["Plan", "Pool", "Unit", "make_plan"]

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Unit:
    """A range of users of one bucket, read and decoded together.

    Attributes:
        window: the window of the pointers, where windows are read one after another; None for all.
        bucket: of the users.
        first_user, end_user: their numbers among the bucket's users (sorted).
        num_examples: of all of them.
        num_events: bounds those of any one group.
    """

    window: str | None
    bucket: int
    first_user: int
    end_user: int
    num_examples: int
    num_events: int


@dataclass(frozen=True)
class Pool:
    """Units whose examples are shuffled with each other.

    Attributes:
        number: among the epoch's pools; seeds the shuffle.
        units: their numbers in the plan.
    """

    number: int
    units: tuple[int, ...]
    num_examples: int


@dataclass(frozen=True)
class Plan:
    """All units of the pinned examples, and the users of each bucket.

    Attributes:
        units: in file order; with windows one after another, window by window.
        users: by window and bucket.
        num_gone: examples left out, because events that they point at are gone.
    """

    units: tuple[Unit, ...]
    users: Mapping[tuple[str | None, int], pa.Array]
    num_gone: int = 0

    @property
    def num_examples(self) -> int:
        return sum(unit.num_examples for unit in self.units)

    def users_of(self, unit: Unit) -> pa.Array:
        """[U] the users of a unit, sorted."""
        users = self.users[unit.window, unit.bucket]
        return users.slice(unit.first_user, unit.end_user - unit.first_user)

    def pools(self, options: OrderOptions, epoch: int) -> list[list[list[Pool]]]:
        """All pools of an epoch, by phase and lane: the phases are the windows where these are read one
        after another, and else there is one."""
        order = np.arange(len(self.units))
        windows = [unit.window for unit in self.units]
        cuts = [i for i in range(1, len(windows)) if windows[i] != windows[i - 1]]
        phases = []
        number = 0
        for phase, part in enumerate(np.split(order, cuts)):
            if options.order != "stored":
                key = np.random.SeedSequence([options.seed, epoch, phase])
                part = np.random.Generator(np.random.Philox(key)).permutation(part)
            pools = list(self._pooled(part.tolist(), options, number))
            number += len(pools)
            phases.append(_dealt(pools, options.lanes))
        return phases

    def _pooled(self, order: list[int], options: OrderOptions, number: int) -> Iterator[Pool]:
        held: list[int] = []
        num_events = num_examples = 0
        for i in order:
            unit = self.units[i]
            full = (
                len(held) >= options.mix or num_events + unit.num_events > options.events_per_pool
            )
            if held and full:
                yield Pool(number, tuple(held), num_examples)
                number += 1
                held, num_events, num_examples = [], 0, 0
            held.append(i)
            num_events += unit.num_events
            num_examples += unit.num_examples
        if held:
            yield Pool(number, tuple(held), num_examples)


def _dealt(pools: Sequence[Pool], num_lanes: int) -> list[list[Pool]]:
    """Each pool goes to the lane with the fewest examples so far, so that all end at about the same
    time."""
    lanes: list[list[Pool]] = [[] for _ in range(num_lanes)]
    fewest = [(0, lane) for lane in range(num_lanes)]
    for pool in pools:
        num_examples, lane = fewest[0]
        lanes[lane].append(pool)
        heapq.heapreplace(fewest, (num_examples + pool.num_examples, lane))
    return lanes


def make_plan(
    pointers: PointerSnapshot,
    histories: Mapping[str, Snapshot],
    projections: Mapping[str, Projection],
    *,
    examples_per_unit: int,
    events_per_unit: int,
    verify: bool,
    drop_gone: bool,
    by_window: bool = False,
) -> Plan:
    """Cut the users of every bucket into units of bounded size.

    A unit holds at most `examples_per_unit` examples and `events_per_unit` events of any one group,
    or a single user.

    Args:
        by_window: units of one window of the pointers each, window by window.
        verify: whether checksums will be verified, which needs all that a pointer spans.
        drop_gone: leave examples out whose events are gone.

    Raises:
        GoneError: there are such examples, and they are not to be left out.
    """
    units: list[Unit] = []
    num_gone = 0
    first_gone: GoneError | None = None
    users: dict[tuple[str | None, int], pa.Array] = {}
    windows = [sealed.window.key for sealed in pointers.windows] if by_window else [None]
    for window in windows:
        part = pointers if window is None else pointers.only(window)
        for bucket in range(part.num_buckets):
            found = part.users_of_bucket(bucket)
            if not len(found):
                continue
            users[window, bucket] = found
            index = part.bucket_index(bucket, found)
            num_examples = index.num_events
            missing = missing_examples(part, histories, projections, bucket, found, verify=verify)
            if missing is not None:
                first_gone = first_gone or missing.error
                num_examples = num_examples - missing.num_examples
                num_gone += int(missing.num_examples.sum())
            num_events = _num_events(index, projections)
            for first, end in _cut(num_examples, num_events, examples_per_unit, events_per_unit):
                here = int(num_examples[first:end].sum())
                if here:
                    events = int(num_events[first:end].sum())
                    units.append(Unit(window, bucket, first, end, here, events))
    if first_gone is not None and not drop_gone:
        raise GoneError(
            group=first_gone.group,
            user_id=first_gone.user_id,
            end_position=first_gone.end_position,
            num_gone=num_gone,
        )
    return Plan(tuple(units), users, num_gone)


def _num_events(index: BucketIndex, projections: Mapping[str, Projection]) -> I64:
    """[U] how many events of any one group each user's pointers span at most."""
    found = np.zeros(len(index.user_ids), np.int64)
    for group, projection in projections.items():
        first = index.extreme(f"{group}_first", "min")
        if projection.max_length is not None:
            low = index.extreme(f"{group}_low", "min")
            first = np.maximum(first, low - projection.max_length)
        found = np.maximum(found, index.extreme(f"{group}_high", "max") - first)
    return found


def _cut(
    num_examples: I64, num_events: I64, max_examples: int, max_events: int
) -> Iterator[tuple[int, int]]:
    examples, events = np.cumsum(num_examples), np.cumsum(num_events)
    first = 0
    while first < len(examples):
        examples_done = int(examples[first - 1]) if first else 0
        events_done = int(events[first - 1]) if first else 0
        end = min(
            int(np.searchsorted(examples, examples_done + max_examples, side="right")),
            int(np.searchsorted(events, events_done + max_events, side="right")),
        )
        end = max(end, first + 1)
        yield first, end
        first = end
