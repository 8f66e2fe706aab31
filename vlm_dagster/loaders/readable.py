"""Which examples can still be rebuilt, where events were erased or dropped by age.

An example is readable if all events that its projections span are there, and, where checksums are
verified, if what its whole pointer spans is there or its checksum is known from the ledger. All others
are left out or refused, as the loader was told: never shortened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vlm_dagster.errors import GoneError
from vlm_dagster.history import Snapshot
from vlm_dagster.pointers import PointerSnapshot
from vlm_dagster.pointers.spec import pointer_fields
from vlm_dagster.schema import Projection
from vlm_dagster.sealed.gone import GoneRows

__all__ = ["Missing", "missing_examples", "readable"]

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
    part = pointers.bucket_index(bucket, some)
    num_examples = part.num_events
    fields = {group: pointer_fields(group) for group in projections}
    names = [fields[g][what] for g in projections for what in ("end_position", "length")]
    read = part.read(names, np.zeros_like(num_examples), num_examples)
    rank = np.repeat(np.arange(len(some)), num_examples)
    bad = np.zeros(len(rank), bool)
    first: tuple[str, object, int] | None = None
    for group, projection in projections.items():
        end, length = (
            np.asarray(read.columns[fields[group][what]]) for what in ("end_position", "length")
        )
        gone = histories[group].gone_of(some)
        here = ~readable(gone, rank, end, length, projection.max_length, verify=verify)
        if here.any() and first is None:
            row = int(np.flatnonzero(here)[0])
            first = (group, some[int(rank[row])].as_py(), int(end[row]))
        bad |= here
    if first is None:
        return None
    found = np.zeros(len(user_ids), np.int64)
    found[np.flatnonzero(suspects)] = np.bincount(rank[bad], minlength=len(some))
    group, user, position = first
    error = GoneError(group=group, user_id=user, end_position=position, num_gone=int(bad.sum()))
    return Missing(found, error)
