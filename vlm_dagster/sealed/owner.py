"""What histories and pointer datasets have in common: they own a sealed table."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from vlm_dagster.engines import Engine
from vlm_dagster.engines.local import LocalEngine
from vlm_dagster.errors import SchemaError
from vlm_dagster.sealed.commit import Sealed, commit_window
from vlm_dagster.sealed.log import SealedWindow
from vlm_dagster.sealed.staging import StagedWindow
from vlm_dagster.sealed.sweep import DEFAULT_GRACE_S, sweep
from vlm_dagster.sealed.table import SealedTable
from vlm_dagster.storage import FileInfo
from vlm_dagster.windows import Window, WindowGrid

if TYPE_CHECKING:
    from vlm_dagster.retention.erasing import ErasureReport

__all__ = ["WindowedTable", "check_num_buckets"]


class WindowedTable:
    """A table of windows that are written once. What its rows mean is its subclass's business."""

    def __init__(self, table: SealedTable, engine: Engine | None) -> None:
        self._table = table
        self._engine: Engine = engine or LocalEngine()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r}, {self._table.spec.name!r})"

    @property
    def uri(self) -> str:
        return self._table.uri

    @property
    def table_id(self) -> str:
        """The Delta table's own id: another table created at the same place has another."""
        return self._table.table_id

    @property
    def num_buckets(self) -> int:
        return self._table.spec.num_buckets

    @property
    def grid(self) -> WindowGrid:
        return self._table.spec.grid

    def commit(self, staged: StagedWindow) -> Sealed:
        """The second half of `seal`: make a staged window visible, at most once."""
        return commit_window(self._table, staged)

    def is_sealed_as(self, staged: StagedWindow) -> bool:
        """Whether a window is sealed with this very content, or was before users were erased."""
        state = self._table.state()
        found = state.sealed.get(staged.window.index)
        return found is not None and found.holds(staged.digest, state)

    def sealed_windows(self) -> list[SealedWindow]:
        """Every window sealed now, oldest first, whether or not one before is missing."""
        return [sealed for _, sealed in sorted(self._table.state().sealed.items())]

    def version_sealing(self, window: str | Window) -> int:
        """The version that sealed a window.

        Raises:
            WatermarkError: it is not sealed.
        """
        return self._table.versions.sealing(self.grid.parse(window))

    def versions_sealing(self, windows: Collection[str | Window]) -> dict[str, int]:
        """`version_sealing` of many windows, by key, in one pass over the log."""
        return self._table.versions.all_sealing([self.grid.parse(window) for window in windows])

    def erase(
        self,
        user_ids: Sequence[Any] | pa.Array,
        *,
        reason: str,
        dry_run: bool = False,
        progress: Callable[[str, int], None] | None = None,
    ) -> ErasureReport:
        """Take users out of the table for good: no version that can be opened holds a row of them,
        and no file that a version named does.

        Rows of all others keep their places and their bytes; pins to earlier versions open the
        newest one from then on. Pointers into what is gone are never shortened: a loader fails on
        them or leaves them out, counted, as it was told (`SequenceLoader(gone=...)`). Call it on
        the histories and on the pointer datasets alike. Killed anywhere, calling it again goes on.

        Args:
            user_ids: the users; some may be unknown.
            reason: kept in the audit record, so name no user in it.
            dry_run: only count.
            progress: called with the name of every segment rewritten, and the rows that left it.

        Raises:
            SchemaError: no user, or no reason, is given, or the ids are of another type.
            CorruptFileError, StorageError: nothing half-done can be seen; call it again.
        """
        from vlm_dagster.retention.erasing import erase

        return erase(self._table, user_ids, reason=reason, dry_run=dry_run, progress=progress)

    def sweep(
        self, *, older_than_s: float = DEFAULT_GRACE_S, dry_run: bool = True
    ) -> list[FileInfo]:
        """Left-over files of killed processes; deleted unless `dry_run`. See `sealed.sweep`."""
        return sweep(self._table, older_than_s=older_than_s, dry_run=dry_run)


def check_num_buckets(num_buckets: int) -> None:
    """SchemaError unless it is a number of buckets that a table can have."""
    if isinstance(num_buckets, bool) or not isinstance(num_buckets, int) or num_buckets < 1:
        raise SchemaError(f"num_buckets={num_buckets!r}", "Use an integer of 1 or more.")
    if num_buckets > 65_536:
        raise SchemaError(f"num_buckets={num_buckets!r} is too many", "Use at most 65,536.")
