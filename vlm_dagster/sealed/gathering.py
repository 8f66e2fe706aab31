"""Copying ranges of arrays: what turning rows into sequences comes down to."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["Placement", "gather", "width_of"]

I64 = npt.NDArray[np.int64]

# From so many values on, a range is copied by itself: a slice of a memoryview costs 0.1 us, and an
# index of every value 0.6 ns for each column and 1.2 ns for all of them.
_LONG = 96


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


def width_of(kind: pa.DataType) -> int | None:
    """Bytes of a value of a type whose arrays are nothing but values one after another; None for
    strings, for booleans (eight to a byte) and the like."""
    if not pa.types.is_primitive(kind) or kind.bit_width not in (8, 16, 32, 64):
        return None
    return int(kind.bit_width) // 8


class Placement:
    """Copies ranges of rows to other places, for any number of columns.

    Args:
        starts: [R] where each range begins in the source.
        counts: [R] how many rows, at least 1.
        targets: [R] where it goes in the destination. No two overlap there.
    """

    def __init__(self, starts: I64, counts: I64, targets: I64) -> None:
        long = counts >= _LONG
        comes, goes, sizes = starts[long], targets[long], counts[long]
        bounds = (comes, comes + sizes, goes, goes + sizes)
        self._long = list(zip(*(bound.tolist() for bound in bounds), strict=True))
        short = ~long
        self._starts, self._counts = starts[short], counts[short]
        self._targets = targets[short]

    @cached_property
    def _indices(self) -> tuple[I64 | slice, I64]:
        """Of every value of the short ranges: where it comes from, where it goes."""
        counts = self._counts
        ends = np.cumsum(counts)
        rows = np.arange(int(ends[-1]))
        to = np.repeat(self._targets - ends + counts, counts)
        to += rows
        if (self._starts[1:] == self._starts[:-1] + counts[:-1]).all():
            begin = int(self._starts[0])
            return slice(begin, begin + len(rows)), to
        from_ = np.repeat(self._starts - ends + counts, counts)
        from_ += rows
        return from_, to

    def copy(self, values: pa.Array, destination: npt.NDArray[Any]) -> None:
        """Copy one column; `destination` is an array of words as wide as its values."""
        if not len(values):
            return
        word = destination.dtype
        data = values.buffers()[1]
        source = np.frombuffer(data, word, len(values), values.offset * word.itemsize)
        if self._long:
            read, write = source.data, destination.data
            for start, end, target, target_end in self._long:
                write[target:target_end] = read[start:end]
        if len(self._counts):
            from_, to = self._indices
            destination[to] = source[from_]
