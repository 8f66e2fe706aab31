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
    from vlm_dagster.history import SnapshotRef
    from vlm_dagster.pointers import PointerRef
    from vlm_dagster.retention.collect import GcReport
    from vlm_dagster.retention.erasing import ErasureReport
    from vlm_dagster.retention.pins import NamedPin

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
    def sealed_table(self) -> SealedTable:
        """The table itself, for the parts of this package."""
        return self._table

    @property
    def num_buckets(self) -> int:
        return self._table.spec.num_buckets

    @property
    def user_id(self) -> pa.DataType:
        """The type of user ids."""
        return self._table.spec.columns.field("user_id").type

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
        break_pins: bool = False,
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
            break_pins: go on although something pins windows that were corrected since:
                only the version it pins has these, and it is retired.
            dry_run: only count.
            progress: called with the name of every segment rewritten, and the rows that left it.

        Raises:
            SchemaError: no user, or no reason, is given, or the ids are of another type.
            PinError: something pins corrected windows, and `break_pins` is not set.
            CorruptFileError, StorageError: nothing half-done can be seen; call it again.
        """
        from vlm_dagster.retention.erasing import erase

        return erase(
            self,
            user_ids,
            reason=reason,
            break_pins=break_pins,
            dry_run=dry_run,
            progress=progress,
        )

    def _ref(self, version: int | None) -> SnapshotRef | PointerRef:
        """The pin of all that a version holds."""
        raise NotImplementedError

    def pinned(self, pin: Any) -> Any:
        """What a pin of this table names, opened where it is kept; or PinError."""
        raise NotImplementedError

    def pin(self, name: str, version: int | None = None, *, reason: str = "") -> NamedPin:
        """Keep a version under a name, whatever else refers to it. The same again changes nothing.

        Args:
            name: letters, digits, `.`, `_` and `-`; up to 100.
            version: the newest if None.

        Raises:
            PinError: the name is taken by another version.
            RetiredVersionError: the version is not kept any more.
        """
        from vlm_dagster.retention.pins import pin_version

        return pin_version(self._table, name, self._ref(version).to_json(), reason)

    def unpin(self, name: str) -> NamedPin:
        """Let a named pin go, or PinError; its version goes with the next collection, unless
        something else holds it."""
        from vlm_dagster.retention.pins import unpin

        return unpin(self._table, name)

    def pins_by_name(self) -> dict[str, NamedPin]:
        """The named pins."""
        from vlm_dagster.retention.pins import read_pins

        return {pin.name: pin for pin in read_pins(self._table)}

    def find_pin(self, name: str) -> NamedPin:
        """The pin of a name, or PinError."""
        from vlm_dagster.retention.pins import find_pin

        return find_pin(self._table, name)

    def gc(
        self,
        *,
        dry_run: bool = True,
        keep_hours: float = 24.0,
        move_pins: bool = False,
        let_dropped_go: bool = False,
        verify: bool = False,
        forget: Sequence[str] = (),
        progress: Callable[[FileInfo], None] | None = None,
    ) -> GcReport:
        """Let go of every version that nothing refers to, and delete what only such versions name.

        Kept are the newest version, those that were it lately, and those that named pins, pointer
        datasets and checkpoints refer to. All pins go on opening what they name, to the byte. Safe
        beside everything else; killed anywhere, calling it again goes on.

        Args:
            dry_run: only say what would go, and what holds the rest.
            keep_hours: a version stays so long after it was the newest: longer than any reader
                takes that opened it without a pin.
            move_pins: what refers to a version whose windows the newest holds too, proved by
                digest, does not hold it: its pin then opens the newest, with the same content.
            let_dropped_go: what refers to a version only for windows that were dropped by age since
                does not hold it either: its examples that reach into them are then refused by a
                loader, or left out and counted.
            verify: before pins are moved, check the newest version's files against their hashes.
            forget: addresses of referrers that hold nothing any more if they cannot be opened; `*`
                stands for anything.
            progress: called with every file when it is deleted.

        Raises:
            TableError: the log, a pin or an entry is damaged; nothing was deleted.
            StorageError: storage refused; call it again.
        """
        from vlm_dagster.retention.collect import gc

        return gc(
            self,
            dry_run=dry_run,
            keep_hours=keep_hours,
            move_pins=move_pins,
            let_dropped_go=let_dropped_go,
            verify=verify,
            forget=forget,
            progress=progress,
        )

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
