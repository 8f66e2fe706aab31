"""One Delta handle for all that is decided and committed: opened once, then brought up to date.

Opening reads the newest checkpoint and what was committed since; bringing up to date only what was
committed since the last time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from vlm_dagster.storage import Storage

__all__ = ["NewestHandle"]


class _Kept(NamedTuple):
    """A handle, and the commit of its version as it stands in the log."""

    handle: DeltaTable
    version: int
    commit: bytes


class NewestHandle:
    """Handles at the newest version.

    What is decided from a handle must be committed with that same handle, unmoved: the log then
    refuses the commit if somebody else's came between. So a handle is lent to one at a time.

    Args:
        open_newest: opens a handle of the table, or raises that there is none.
        first: one that is open already.
        on_replaced: called when the log turns out not to go on from the handle that was kept: what
            was read of it may be wrong.
    """

    def __init__(
        self,
        storage: Storage,
        open_newest: Callable[[], DeltaTable],
        first: DeltaTable | None,
        on_replaced: Callable[[], None] = lambda: None,
    ) -> None:
        self._storage = storage
        self._open = open_newest
        self._on_replaced = on_replaced
        self._kept: _Kept | None = None
        self._lock = threading.Lock()
        if first is not None:
            self._keep(first, None)

    @contextlib.contextmanager
    def lent(self) -> Iterator[DeltaTable]:
        """A handle at the version that is the newest now, for the caller alone until he is done."""
        with self._lock:
            kept, self._kept = self._kept, None
        renewed = kept is not None and self._renewed(kept)
        handle = kept.handle if kept is not None and renewed else self._open()
        yield handle
        # Not after an error: whatever it was, a handle that is opened anew knows better.
        self._keep(handle, kept if renewed else None)

    def _renewed(self, kept: _Kept) -> bool:
        try:
            # The log may have been cleaned, or replaced by another table's: it begins anew then.
            if self._storage.read_bytes(_path(kept.version)) != kept.commit:
                self._on_replaced()
                return False
            table_id = kept.handle.metadata().id
            kept.handle.update_incremental()
            return bool(kept.handle.metadata().id == table_id)
        except FileNotFoundError:
            self._on_replaced()
            return False
        except (DeltaError, OSError):
            return False

    def _keep(self, handle: DeltaTable, before: _Kept | None) -> None:
        version = int(handle.version())
        if before is None or before.version != version:
            try:
                before = _Kept(handle, version, self._storage.read_bytes(_path(version)))
            except OSError:
                return
        with self._lock:
            self._kept = before


def _path(version: int) -> str:
    return f"_delta_log/{version:020d}.json"
