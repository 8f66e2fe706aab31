"""Copying ranges of arrays: what turning rows into sequences comes down to."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["Placement", "gather", "width_of"]

I64 = npt.NDArray[np.int64]

# Ranges of so many values are copied one by one: a slice of a memoryview costs 0.1 us.
_LONG = 512
# Shorter ones in blocks of so many, 0.03 us each, and even shorter ones value by value, 1 ns each.
_BLOCK = 64


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
        long, short = counts >= _LONG, counts < _BLOCK
        comes, goes, sizes = starts[long], targets[long], counts[long]
        bounds = (comes, comes + sizes, goes, goes + sizes)
        self._long = list(zip(*(bound.tolist() for bound in bounds), strict=True))
        medium = ~(long | short)
        self._medium = starts[medium], counts[medium], targets[medium]
        self._short = starts[short], counts[short], targets[short]

    @cached_property
    def _blocks(self) -> tuple[I64, I64]:
        """Where each block of the medium ranges begins, here and there. A range's last block ends where
        the range does, so it copies some values a second time."""
        starts, counts, targets = self._medium
        num_blocks = -(-counts // _BLOCK)
        number = _counted(num_blocks)
        offset = np.minimum(number * _BLOCK, np.repeat(counts - _BLOCK, num_blocks))
        return np.repeat(starts, num_blocks) + offset, np.repeat(targets, num_blocks) + offset

    @cached_property
    def _values(self) -> tuple[I64 | slice, I64]:
        """Of every value of the short ranges: where it comes from, where it goes."""
        starts, counts, targets = self._short
        number = _counted(counts)
        to = np.repeat(targets, counts) + number
        if (starts[1:] == starts[:-1] + counts[:-1]).all():
            begin = int(starts[0])
            return slice(begin, begin + len(to)), to
        return np.repeat(starts, counts) + number, to

    def copy(self, values: pa.Array, destination: npt.NDArray[Any]) -> None:
        """Copy one column; `destination` is an array of words as wide as its values."""
        if not len(values):
            return
        word = destination.dtype
        source = np.frombuffer(
            values.buffers()[1], word, len(values), values.offset * word.itemsize
        )
        if self._long:
            read, write = source.data, destination.data
            for start, end, target, target_end in self._long:
                write[target:target_end] = read[start:end]
        if len(self._medium[0]):
            from_, to = self._blocks
            _windows(destination)[to] = _windows(source)[from_]
        if len(self._short[0]):
            places, to = self._values
            destination[to] = source[places]


def _counted(counts: I64) -> I64:
    """[sum(counts)] 0, 1, ... for each count."""
    ends = np.cumsum(counts)
    return np.arange(int(ends[-1])) - np.repeat(ends - counts, counts)


def _windows(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[N - _BLOCK + 1, _BLOCK] the block from each value on, in the same memory."""
    shape = (len(values) - _BLOCK + 1, _BLOCK)
    return np.ndarray(shape, values.dtype, values.data, strides=(values.itemsize,) * 2)
