"""The checksum of a sequence: the sum, modulo 2^64, of `event_words` over its positions.

Sums make it cheap: one cumulative sum over a user's history gives the checksum of any of its ranges.
Stored as a signed integer with the same bits, because Delta has no unsigned ones.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vlm_dagster.hashing import event_words

__all__ = ["checksum_of_ranges"]

I64 = npt.NDArray[np.int64]


def checksum_of_ranges(event_ids: pa.Array, positions: I64, starts: I64, ends: I64) -> I64:
    """Checksums of ranges of an arena.

    Args:
        event_ids: [N] the events' ids.
        positions: [N] each event's position in its user's history.
        starts, ends: [P] ranges `[starts[i], ends[i])` of the arena, each within one user.

    Returns:
        [P] checksums; 0 for an empty range.
    """
    total = np.zeros(len(event_ids) + 1, np.uint64)
    np.cumsum(event_words(event_ids, positions), dtype=np.uint64, out=total[1:])
    return (total[ends] - total[starts]).view(np.int64)
