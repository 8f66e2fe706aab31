"""Where the time goes: what each stage was busy with, and what the trainer waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Meter"]


class Meter:
    """Adds up what the stages report, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._busy: dict[str, float] = {}
        self._waited: dict[str, float] = {}

    @contextmanager
    def busy(self, stage: str) -> Iterator[None]:
        """Counts the time within as work of a stage."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._add(self._busy, stage, time.perf_counter() - begin)

    def waited(self, stage: str, seconds: float) -> None:
        """Counts time that something waited for a stage."""
        self._add(self._waited, stage, seconds)

    def _add(self, where: dict[str, float], stage: str, seconds: float) -> None:
        with self._lock:
            where[stage] = where.get(stage, 0.0) + seconds
