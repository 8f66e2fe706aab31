"""Copying ranges of arrays one after another: what turning rows into sequences comes down to."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["gather"]

I64 = npt.NDArray[np.int64]


def gather(values: pa.Array, starts: I64, lengths: I64) -> pa.Array:
    """Ranges of an array, copied one after another into memory of their own: [sum(lengths)].

    A list view's flatten is the fastest gather at hand: it copies whole ranges.
    """
    some = lengths > 0
    views = pa.LargeListViewArray.from_arrays(
        pa.array(starts[some]), pa.array(lengths[some]), values
    )
    found = views.flatten()
    if len(found) and found.buffers()[-1].address == values.buffers()[-1].address:
        # Ranges that happen to adjoin come back as a view of the source.
        found = found.take(pa.array(np.arange(len(found))))
    return found
