"""Memory that arenas are read into, over and over: fresh memory costs more than decoding."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ArenaBuffers"]

Bytes = npt.NDArray[np.uint8]

# Smaller ones are the allocator's business.
_SMALLEST = 1 << 18


class ArenaBuffers:
    """Blocks of memory that readers fill and that come back by themselves.

    A block is used again once nothing refers to it any more: no Arrow array, no slice of one, and no
    numpy array or tensor made of one. So nobody's data is ever overwritten, and whoever keeps an
    arena for longer only keeps the next one from using its memory. Safe to share between threads.

    Args:
        max_idle_bytes: of blocks that wait to be used again; what exceeds it goes back to the system,
            at the next use.
    """

    def __init__(self, max_idle_bytes: int = 1 << 30) -> None:
        self.max_idle_bytes = max_idle_bytes
        self._lock = threading.Lock()
        self._idle: list[Bytes] = []
        # Blocks come back when the garbage collector says so, in any thread and at any instant, even
        # while this one holds the lock: so coming back takes no lock.
        self._returned: deque[Bytes] = deque()

    def empty(self, num_values: int, kind: npt.DTypeLike) -> npt.NDArray[Any]:
        """[num_values] uninitialised.

        Hand it on as a buffer (`pa.py_buffer`): an array that numpy makes of it, a slice say, keeps
        the block alive but not this array, and it is this array's end that brings the block back.
        """
        kind = np.dtype(kind)
        num_bytes = num_values * kind.itemsize
        if num_bytes < _SMALLEST:
            return np.empty(num_values, kind)
        block = self._take(num_bytes)
        if block is None:
            # Eighths of a power of two: units differ in size, and should find each other's blocks.
            step = 1 << max((num_bytes - 1).bit_length() - 4, 12)
            block = np.empty(-(-num_bytes // step) * step, np.uint8)
        lent = block[:num_bytes].view(kind)
        # By a weak reference: a block that is lent must not keep those that came back.
        weakref.finalize(lent, _give_back, weakref.ref(self), block).atexit = False
        return lent

    def _take(self, num_bytes: int) -> Bytes | None:
        with self._lock:
            while self._returned:
                self._idle.append(self._returned.popleft())
            fits = [b for b in self._idle if num_bytes <= len(b) <= 2 * num_bytes]
            best = min(fits, key=len, default=None)
            kept: list[Bytes] = []
            room = self.max_idle_bytes
            for block in reversed(self._idle):  # the newest ones stay
                if block is not best and len(block) <= room:
                    kept.append(block)
                    room -= len(block)
            self._idle = kept[::-1]
            return best


def _give_back(buffers: weakref.ref[ArenaBuffers], block: Bytes) -> None:
    there = buffers()
    if there is not None and there.max_idle_bytes:
        there._returned.append(block)
