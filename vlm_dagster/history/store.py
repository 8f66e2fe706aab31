"""The history table of one feature group: create it, seal windows into it, take snapshots."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vlm_dagster.encodings import portable_encodings
from vlm_dagster.engines import Engine
from vlm_dagster.errors import DroppedError, PinError, SchemaError
from vlm_dagster.history.compaction import CompactionReport, Merge, compact
from vlm_dagster.history.correction import check_correctable, commit_correction
from vlm_dagster.history.dropping import DropReport, drop_before
from vlm_dagster.history.snapshot import Snapshot, SnapshotRef
from vlm_dagster.history.validate import validated_events
from vlm_dagster.schema import FeatureGroup
from vlm_dagster.sealed import (
    Sealed,
    SealedTable,
    StagedWindow,
    TableSpec,
    TableState,
)
from vlm_dagster.sealed.duplicates import DuplicateFilter
from vlm_dagster.sealed.incoming import Rows
from vlm_dagster.sealed.owner import WindowedTable, check_num_buckets
from vlm_dagster.sealed.retired import kept_versions
from vlm_dagster.sealed.staging import Correction
from vlm_dagster.sealed.stripes import DEFAULT_EDGES, Stripes
from vlm_dagster.windows import Cadence, Window, WindowGrid

__all__ = ["HistoryStore"]

Progress = Callable[[int], None]


class HistoryStore(WindowedTable):
    """Every event of one feature group, stored once, in immutable windows.

    A store is safe to share between threads and cheap to open; processes open their own.
    """

    def __init__(self, table: SealedTable, group: FeatureGroup, engine: Engine | None = None):
        super().__init__(table, engine)
        self.group = group

    @classmethod
    def create(
        cls,
        uri: str | os.PathLike[str],
        group: FeatureGroup,
        num_buckets: int = 16,
        *,
        windows: Cadence = "daily",
        start: str | None = None,
        bands: Sequence[int] = DEFAULT_EDGES,
        portable: bool = False,
        storage_options: Mapping[str, str] | None = None,
        engine: Engine | None = None,
    ) -> HistoryStore:
        """Create the table, or open it if it is there already with the same declaration.

        Args:
            uri: a folder or an object-store URL.
            num_buckets: hash buckets of users; fixed for the table's life. Aim at files of
                some 100 MB for the largest windows after compaction.
            windows: the length of a window.
            start: the key of the first window. None: the first window sealed is the first, and
                none before it can be added.
            bands: edges of the recency bands, in newest events of a user within a file: choose
                some just above the lengths that models read. A file records those that its
                longest history reaches past. Empty: one band, users in order of id. Where they lie
                matters less than one may think; `vlm_dagster.history.choose_edges` works out the
                best ones from another table's data and the lengths that models read.
            portable: use only encodings that readers of long ago know too: Spark 3.5 reads all
                columns then, as it otherwise does not (4.3 does). Costs about a byte an event.
            storage_options: as deltalake takes them; never stored, never shown.

        Raises:
            TableError: something else lies there, or the table was declared otherwise.
        """
        check_num_buckets(num_buckets)
        spec = _spec(group, num_buckets, WindowGrid(windows), start, bands, portable)
        return cls(SealedTable.create(os.fspath(uri), spec, storage_options), group, engine)

    @classmethod
    def open(
        cls,
        uri: str | os.PathLike[str],
        *,
        storage_options: Mapping[str, str] | None = None,
        engine: Engine | None = None,
    ) -> HistoryStore:
        """Open an existing history table.

        Raises:
            TableError: there is none, it is not a history table, or it is newer than this code.
        """
        table = SealedTable.open(os.fspath(uri), "history", _revive, storage_options)
        return cls(table, FeatureGroup.from_json(table.spec.details["group"]), engine)

    # -- sealing ------------------------------------------------------------------------------

    def seal(
        self, window: str | Window, events: Rows, *, progress: Progress | None = None
    ) -> Sealed:
        """Store the events of one window, all of them at once, forever.

        Sealing the same content again changes nothing and says `reused`. An empty input seals
        an empty window.

        Args:
            window: its key, e.g. "1997-09-20".
            events: Arrow table, stream of batches, or Parquet path(s), in any order.
            progress: called with the number of rows read, as they are.

        Raises:
            WindowSealedError: the window is sealed with other content.
            SchemaError, InvalidEventsError: the events do not fit; nothing was written.
        """
        return self.commit(self.stage(window, events, progress=progress))

    def stage(
        self, window: str | Window, events: Rows, *, progress: Progress | None = None
    ) -> StagedWindow:
        """The first half of `seal`: check, sort and write files that nobody sees yet."""
        state = self._table.state()
        checked = self._table.check_window(window, state)
        return self._stage(checked, state, events, progress, again=False)

    def _stage(
        self,
        window: Window,
        state: TableState,
        events: Rows,
        progress: Progress | None,
        *,
        again: bool,
    ) -> StagedWindow:
        rows = validated_events(self.group, self.grid, window, self.num_buckets, events, progress)
        duplicates = DuplicateFilter("event_id", self.group.duplicates)
        return self._table.stage(
            window,
            state,
            rows,
            self.group.stored_schema,
            engine=self._engine,
            finish=duplicates,
            facts={},
            counts=lambda: {"num_duplicates": duplicates.num_duplicates},
            again=again,
        )

    def correct(
        self,
        window: str | Window,
        events: Rows,
        *,
        reason: str,
        name: str | None = None,
        progress: Progress | None = None,
    ) -> Sealed:
        """Replace the content of a sealed window, all of it: its next revision.

        Pins and pointers from before keep replaying the old revision, until it is retired. The
        same content as now changes nothing and says `reused`.

        Args:
            events: all events of the window, as for `seal`.
            reason: why; recorded.
            name: of the revision, recorded; KEY@REVISION by default.

        Raises:
            WindowError: it is not sealed, was dropped, or was corrected by somebody else meanwhile.
            SchemaError, InvalidEventsError: the events do not fit; nothing was written.
        """
        return self.commit(
            self.stage_correction(window, events, reason=reason, name=name, progress=progress)
        )

    def stage_correction(
        self,
        window: str | Window,
        events: Rows,
        *,
        reason: str,
        name: str | None = None,
        progress: Progress | None = None,
    ) -> StagedWindow:
        """The first half of `correct`: check, sort and write files that nobody sees yet."""
        if not reason.strip():
            raise SchemaError("a correction without a reason", "Say why the window is replaced.")
        state = self._table.state()
        checked = self._table.check_window(window, state)
        now = check_correctable(self._table, state, checked)
        staged = self._stage(checked, state, events, progress, again=True)
        name = name or f"{checked.key}@{now.revision + 1}"
        return replace(staged, correction=Correction(reason, name, now.revision, now.digest))

    def commit(self, staged: StagedWindow) -> Sealed:
        """The second half of `seal` or `correct`."""
        if staged.correction is not None:
            return commit_correction(self._table, staged)
        return super().commit(staged)

    # -- layout -------------------------------------------------------------------------------

    def compact(
        self,
        *,
        fanout: int = 8,
        max_windows: int = 512,
        dry_run: bool = False,
        progress: Callable[[Merge], None] | None = None,
    ) -> CompactionReport:
        """Merge small segments into larger ones. No data changes: every window keeps its digest,
        which is proved from the new files before they replace the old ones.

        Safe beside sealing, reading and other compactions; killed anywhere, it loses nothing.
        Versions from before keep their files until nothing refers to them and they are collected.

        Args:
            fanout: how many segments of a tier become one of the next.
            max_windows: the most windows of a segment.
            dry_run: only say what would be merged.
            progress: called with every merge when it is committed.

        Raises:
            CorruptFileError: a file is not what was sealed; nothing was replaced by it.
        """
        return compact(
            self._table,
            fanout=fanout,
            max_windows=max_windows,
            dry_run=dry_run,
            progress=progress,
        )

    def drop_before(
        self, window: str | Window, *, reason: str = "", dry_run: bool = False
    ) -> DropReport:
        """Drop the events before a window by age, as whole segments.

        Positions of all later events stay what they were. Pointers that reach into what is gone
        are never shortened: a loader fails on them or drops and counts them, as it was told. The
        files stay until the versions that name them are collected (`vlm-dagster gc`).

        Args:
            window: the first one to keep. Where a segment holds windows of both sides, it stays.
            dry_run: only say what would go.
        """
        return drop_before(self._table, self.grid.parse(window), reason, dry_run=dry_run)

    # -- versions -----------------------------------------------------------------------------

    def snapshot(self, version: int | None = None) -> Snapshot:
        """The table at a version; None means the newest now, whose number is then fixed.

        Raises:
            TableError: the version cannot be opened.
        """
        return Snapshot(self._table, self.group, self._table.state(version))

    def ref(self, version: int | None = None) -> SnapshotRef:
        """The pin of a version (the newest if None), whether or not it is kept any more."""
        state = self._table.state(version)
        return Snapshot(self._table, self.group, state).ref()

    def _ref(self, version: int | None) -> SnapshotRef:
        return self.ref(version)

    def pinned_as(self, name: str) -> Snapshot:
        """What a named pin names, or PinError; see `pin`."""
        return SnapshotRef.from_json(self.find_pin(name).ref).open(store=self)

    def pinned(self, pin: SnapshotRef) -> Snapshot:
        """What a pin of this table names; see `SnapshotRef.open`.

        Raises:
            PinError: no version that is kept holds it.
        """
        newest = self._table.state()
        retired = pin.version in newest.retired
        found = ""
        dropped: PinError | None = None
        best: Snapshot | None = None
        for version in kept_versions(self._table, newest) if retired else [pin.version]:
            state = newest if version == newest.version else self._table.state(version)
            snapshot = Snapshot(self._table, self.group, state, pin=pin)
            found = found or snapshot.digest
            if snapshot.digest == pin.digest:
                try:
                    _check_not_dropped(snapshot, pin, state)
                except PinError as error:  # one from before that may be kept
                    dropped = dropped or error
                    continue
                # Where windows were dropped since, one from before that may be kept and have them.
                if best is None or snapshot.num_events > best.num_events:
                    best = snapshot
                if not any(one.kind == "drop" for one in state.gone.removals):
                    break
        if best is not None:
            return best
        if dropped is not None:
            raise dropped
        by, at = newest.retired.by, newest.retired.at
        raise PinError(
            f"history table {self.uri} at version {pin.version}",
            pinned=f"digest {pin.digest}",
            found=f"digest {found}",
            way_out=f"Its version was retired ({by}, {at}), and later ones hold corrected content: "
            "build the pointers anew."
            if retired
            else "Its log was altered; restore it from a copy.",
        )

    def version_covering(self, window: str | Window) -> int:
        """The first version whose watermark covers a window; it never changes once there is one.

        Raises:
            WatermarkError: an earlier window, or this one, is not sealed yet.
        """
        return self._table.versions.covering(self.grid.parse(window))

    def versions_covering(self, windows: Collection[str | Window]) -> dict[str, int]:
        """`version_covering` of many windows, by key, in one pass over the log."""
        parsed = [self.grid.parse(window) for window in windows]
        return self._table.versions.all_covering(parsed)


def _check_not_dropped(snapshot: Snapshot, pin: SnapshotRef, state: TableState) -> None:
    """A pin that was moved forward needs the counts of every user at its watermark: these are known
    only if what was dropped since lies before it."""
    dropped = [one.through for one in state.gone.removals if one.kind == "drop"]
    if not dropped or not snapshot.windows or snapshot.version == pin.version:
        return
    last = max(snapshot.grid.parse(key) for key in dropped)
    if pin.watermark_us is None or last.end_us > pin.watermark_us:
        raise DroppedError(
            f"history table {snapshot.uri} at version {pin.version}",
            pinned=f"what is complete up to {snapshot.watermark}",
            found=f"windows through {last.key} dropped",
            way_out="All that it shows has been dropped by age; train on later examples.",
        )


def _spec(
    group: FeatureGroup,
    num_buckets: int,
    grid: WindowGrid,
    start: str | None,
    bands: Sequence[int],
    portable: bool,
) -> TableSpec:
    chosen = {t.name: t.encoding for t in group.traits if t.encoding is not None}
    return TableSpec(
        kind="history",
        name=group.name,
        columns=group.stored_schema,
        sort_columns=("user_id", group.clock, "event_id"),
        num_buckets=num_buckets,
        grid=grid,
        start=None if start is None else grid.parse(start),
        details={"group": group.to_json(), "portable": portable},
        stripes=Stripes.of(bands),
        encodings={**(portable_encodings(group.stored_schema) if portable else {}), **chosen},
    )


def _revive(declared: dict[str, Any]) -> TableSpec:
    return _spec(
        FeatureGroup.from_json(declared["group"]),
        declared["num_buckets"],
        WindowGrid(declared["windows"]),
        declared["start"],
        declared["bands"],
        declared.get("portable", False),
    )
