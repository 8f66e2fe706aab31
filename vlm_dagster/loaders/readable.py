"""Which examples can still be rebuilt, where events were erased or dropped by age.

An example is readable if all events that its projections span are there, and, where checksums are
verified, if what its whole pointer spans is there or its checksum is known from the ledger. All others
are left out or refused, as the loader was told: never shortened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vlm_dagster.errors import GoneError
from vlm_dagster.history import ArenaBuffers, Snapshot
from vlm_dagster.pointers import PointerSnapshot
from vlm_dagster.pointers.spec import pointer_fields
from vlm_dagster.schema import Projection
from vlm_dagster.sealed.gone import GoneRows

__all__ = ["Asked", "Missing", "missing_examples", "read_asked", "readable"]

I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


def readable(
    gone: GoneRows, rank: I64, end: I64, length: I64, max_length: int | None, *, verify: bool
) -> Bools:
    """[P] whether pointers into one group can be rebuilt.

    Args:
        gone: what is gone of the U users.
        rank: [P] the number of each pointer's user.
        end, length: [P] the pointers.
        max_length: how many newest events are read; None means all.
    """
    counts = gone.counts[rank]
    start = end - length
    first = start if max_length is None else np.maximum(start, end - max_length)
    found = (first >= counts) | (length == 0)
    if verify:
        # From position 0 on, the sum over what is gone stands in for it.
        found &= (start >= counts) | (length == 0) | ((start == 0) & gone.certain[rank])
    return np.asarray(found, bool)


@dataclass(frozen=True)
class Asked:
    """What some users' P examples ask for, by user and then by request time.

    Attributes:
        rank: [P] the number of each example's user.
        columns: of the examples, [P] each.
        pointers: per group and part ("end_position", "length", "checksum"), [P].
        gone: per group, what has left of the users.
        readable: per group, [P] whether its sequence can be rebuilt.
    """

    rank: I64
    columns: dict[str, pa.Array]
    pointers: dict[str, dict[str, I64]]
    gone: dict[str, GoneRows]
    readable: dict[str, Bools]

    @property
    def is_readable(self) -> Bools:
        """[P] whether the sequences of all groups can be rebuilt."""
        found = np.ones(len(self.rank), bool)
        for of_group in self.readable.values():
            found &= of_group
        return found

    def only_readable(self) -> Asked:
        """The examples that can be rebuilt."""
        keep = self.is_readable
        if keep.all():
            return self
        return Asked(
            self.rank[keep],
            {name: column.filter(pa.array(keep)) for name, column in self.columns.items()},
            {g: {p: v[keep] for p, v in parts.items()} for g, parts in self.pointers.items()},
            self.gone,
            {group: found[keep] for group, found in self.readable.items()},
        )


def read_asked(
    pointers: PointerSnapshot,
    histories: Mapping[str, Snapshot],
    projections: Mapping[str, Projection],
    bucket: int,
    user_ids: pa.Array,
    *,
    columns: Sequence[str] = (),
    checksums: bool = False,
    whole: bool,
    buffers: ArenaBuffers | None = None,
) -> Asked:
    """Read the examples of some users, without the histories that they point into.

    Args:
        user_ids: [U] of this bucket, sorted and distinct.
        columns: of the examples.
        checksums: read those of the pointers too.
        whole: an example can be rebuilt only if its checksum could be verified.
        buffers: memory to read into; fresh memory if None.
    """
    parts = ["end_position", "length", *(["checksum"] if checksums else [])]
    fields = {group: pointer_fields(group) for group in projections}
    names = [found[part] for found in fields.values() for part in parts]
    index = pointers.bucket_index(bucket, user_ids)
    counts = index.num_events
    wanted = list(dict.fromkeys([*columns, *names]))
    read = index.read(wanted, np.zeros_like(counts), counts, buffers=buffers).columns
    rank = np.repeat(np.arange(len(user_ids)), counts)
    found = {g: {p: np.asarray(read[fields[g][p]]) for p in parts} for g in projections}
    gone = {group: histories[group].gone_of(user_ids) for group in projections}
    return Asked(
        rank,
        {name: read[name] for name in columns},
        found,
        gone,
        {
            group: readable(
                gone[group],
                rank,
                found[group]["end_position"],
                found[group]["length"],
                projection.max_length,
                verify=whole,
            )
            for group, projection in projections.items()
        },
    )


@dataclass(frozen=True)
class Missing:
    """Examples that cannot be rebuilt: [U] how many of each user of a bucket."""

    num_examples: I64
    error: GoneError


def missing_examples(
    pointers: PointerSnapshot,
    histories: Mapping[str, Snapshot],
    projections: Mapping[str, Projection],
    bucket: int,
    user_ids: pa.Array,
    *,
    verify: bool,
) -> Missing | None:
    """The examples of a bucket's users (sorted, distinct) that cannot be rebuilt; None if all can.
    Pointers are read only of users whose first one begins among what is gone."""
    index = pointers.bucket_index(bucket, user_ids)
    suspects = np.zeros(len(user_ids), bool)
    for group in projections:
        counts = histories[group].gone_of(user_ids).counts
        if counts.any():
            suspects |= index.extreme(f"{group}_first", "min") < counts
    if not suspects.any():
        return None
    some = user_ids.filter(pa.array(suspects))
    asked = read_asked(pointers, histories, projections, bucket, some, whole=verify)
    bad = ~asked.is_readable
    if not bad.any():
        return None
    group = next(group for group, found in asked.readable.items() if not found.all())
    row = int(np.flatnonzero(~asked.readable[group])[0])
    found = np.zeros(len(user_ids), np.int64)
    found[np.flatnonzero(suspects)] = np.bincount(asked.rank[bad], minlength=len(some))
    error = GoneError(
        group=group,
        user_id=some[int(asked.rank[row])].as_py(),
        end_position=int(asked.pointers[group]["end_position"][row]),
        num_gone=int(bad.sum()),
    )
    return Missing(found, error)
