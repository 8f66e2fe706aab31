"""Turning Ctrl-C and termination into a request to stop at the next good moment."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any, Self

__all__ = ["StopRequest"]

# One Ctrl-C under torchrun reaches a rank twice: from the terminal and from torchrun.
_SAME_PRESS_S = 2.0


class StopRequest:
    """While entered, SIGINT and SIGTERM only set `signal`; a later second one interrupts at once.

    Enter it in the main thread. Without it, or before any signal, `signal` is None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._at = 0.0
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._at = number, now
        elif now - self._at > _SAME_PRESS_S:
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
