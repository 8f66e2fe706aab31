"""The newest version of a table, without loading it anew for everybody who asks.

A Delta handle costs time by the number of files (0.2 s for 100,000), whatever it is wanted for. Whether
the version of one that is loaded already is still the newest is two small files of the log: its own
commit must be what it was (else another table lies there now, or the log was cleaned), and the next
commit must not be there.
"""

from __future__ import annotations

import threading

from deltalake import DeltaTable

from vlm_dagster.storage import Storage

__all__ = ["Newest"]


class Newest:
    """Remembers the newest version seen and its handle. Safe to share between threads."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._lock = threading.Lock()
        self._known: tuple[int, bytes] | None = None
        self._handle: DeltaTable | None = None

    def remember(self, handle: DeltaTable) -> None:
        """A handle that was just opened at the newest version; nobody may commit with it."""
        version = int(handle.version())
        try:
            commit = self._storage.read_bytes(_commit_path(version))
        except FileNotFoundError:  # a checkpoint stands for it: nothing to recognise it by
            return
        with self._lock:
            if self._known is None or self._known[0] <= version:
                self._known, self._handle = (version, commit), handle

    def version(self) -> int | None:
        """The newest version, if it is still the one remembered."""
        with self._lock:
            known = self._known
        if known is None:
            return None
        try:
            if (
                self._storage.read_bytes(_commit_path(known[0])) == known[1]
                and self._storage.size(_commit_path(known[0] + 1)) is None
            ):
                return known[0]
        except FileNotFoundError:
            pass
        with self._lock:
            if self._known == known:
                self._known = self._handle = None
        return None

    def take(self, version: int) -> DeltaTable | None:
        """The handle of that version if it is here; then it is let go, since it weighs much."""
        with self._lock:
            if self._known is None or self._known[0] != version:
                return None
            handle, self._handle = self._handle, None
            return handle


def _commit_path(version: int) -> str:
    return f"_delta_log/{version:020d}.json"
