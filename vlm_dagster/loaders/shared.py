"""Memory that two processes share, in blocks that are used over and over.

One side, the lender, takes blocks and fills them; the other, the borrower, reads them in place and
says which it is done with. The memory is a file without a name: it needs no room in /dev/shm, whose
size containers limit, and is gone with the last process that has it, however that ends.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import tempfile
import weakref
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["Block", "Borrower", "Lender", "shared_file"]

Bytes = npt.NDArray[np.uint8]

# Mapped at once: every mapping holds a file descriptor. Only pages that are written take memory.
_EXTENT_BYTES = 1 << 28
_SMALLEST = 1 << 16


def shared_file() -> int:
    """The descriptor of an empty file without a name, in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        try:
            return os.memfd_create("vlm-units")
        except OSError as error:  # sandboxes may forbid it
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
    with tempfile.TemporaryFile(prefix="vlm-units-") as file:
        return os.dup(file.fileno())


class Block(NamedTuple):
    """A stretch of the shared file, all in bytes: `[begin, begin + size)` of the extent that lies at
    `[extent, extent + extent_size)`."""

    extent: int
    extent_size: int
    begin: int
    size: int


class _Extents:
    """The file, mapped piece by piece."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._maps: dict[int, tuple[mmap.mmap, Bytes]] = {}

    def of(self, block: Block) -> tuple[mmap.mmap, Bytes]:
        if block.extent not in self._maps:
            found = mmap.mmap(self._descriptor, block.extent_size, offset=block.extent)
            self._maps[block.extent] = found, np.frombuffer(found, np.uint8)
        return self._maps[block.extent]

    def bytes_of(self, block: Block, num_bytes: int) -> Bytes:
        return self.of(block)[1][block.begin : block.begin + num_bytes]


class Lender:
    """The side that fills blocks. Not for several threads at a time.

    Args:
        max_idle_bytes: of blocks that wait to be used again and keep their memory.
    """

    def __init__(self, descriptor: int, max_idle_bytes: int = 1 << 28) -> None:
        self._descriptor = descriptor
        self._max_idle_bytes = max_idle_bytes
        self._extents = _Extents(descriptor)
        self._end = 0
        self._last: Block | None = None  # up to where the newest extent is taken
        self._lent: set[Block] = set()
        self._idle: list[Block] = []  # the newest last
        self._cold: list[Block] = []  # without memory
        self._can_release = hasattr(mmap, "MADV_REMOVE")

    @property
    def num_bytes(self) -> int:
        """Of the blocks that may have memory."""
        return sum(block.size for block in (*self._lent, *self._idle))

    def take(self, num_bytes: int) -> tuple[Block, Bytes]:
        """A block for so many bytes, and its memory [num_bytes], with whatever stands there."""
        block = self._fitting(self._idle, num_bytes) or self._fitting(self._cold, num_bytes)
        if block is None:
            block = self._new(num_bytes)
        self._lent.add(block)
        return block, self._extents.bytes_of(block, num_bytes)

    def give_back(self, blocks: Iterable[Block]) -> None:
        """Nobody reads these blocks any more."""
        for block in blocks:
            self._lent.remove(block)
            self._idle.append(block)
        room = self._max_idle_bytes
        kept: list[Block] = []
        for block in reversed(self._idle):
            if block.size <= room or not self._release(block):
                kept.append(block)
                room -= block.size
        self._idle = kept[::-1]

    def _release(self, block: Block) -> bool:
        """Whether the block's memory is the system's again."""
        if self._can_release:
            whole, _ = self._extents.of(block)
            try:
                whole.madvise(mmap.MADV_REMOVE, block.begin, block.size)
            except OSError:  # not every file system can
                self._can_release = False
            else:
                self._cold.append(block)
        return self._can_release

    def _fitting(self, blocks: list[Block], num_bytes: int) -> Block | None:
        # What keeps its memory anyhow is better used for something small than left alone.
        most = max(2 * num_bytes, _SMALLEST) if self._can_release else math.inf
        fits = [b for b in blocks if num_bytes <= b.size <= most]
        best = min(reversed(fits), key=lambda block: block.size, default=None)
        if best is not None:
            blocks.remove(best)
        return best

    def _new(self, num_bytes: int) -> Block:
        # Eighths of a power of two: units differ in size, and should find each other's blocks.
        step = 1 << max((num_bytes - 1).bit_length() - 4, 0)
        size = max(-(-num_bytes // step) * step, _SMALLEST)
        size = -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        last = self._last
        if last is None or last.begin + last.size + size > last.extent_size:
            extent_size = max(_EXTENT_BYTES, size)
            os.ftruncate(self._descriptor, self._end + extent_size)
            last = Block(self._end, extent_size, 0, 0)
            self._end += extent_size
        block = last._replace(begin=last.begin + last.size, size=size)
        self._last = block
        return block


class Borrower:
    """The side that reads blocks in place.

    Attributes:
        returned: blocks that nothing refers to any more, to be told to the lender. They get here when
            the garbage collector says so, in any thread and at any instant.
    """

    def __init__(self, descriptor: int) -> None:
        self._extents = _Extents(descriptor)
        self.returned: deque[Block] = deque()

    def borrow(self, block: Block, num_bytes: int) -> pa.Buffer:
        """The first bytes of a block; it is returned when the last array in it is gone.

        Raises:
            OSError: it cannot be mapped; it is returned then.
        """
        try:
            lent = self._extents.bytes_of(block, num_bytes)
        except BaseException:
            self.returned.append(block)
            raise
        weakref.finalize(lent, self.returned.append, block).atexit = False
        return pa.py_buffer(lent)

    def take_returned(self) -> list[Block]:
        """What was returned since the last time."""
        found = []
        while self.returned:
            found.append(self.returned.popleft())
        return found
