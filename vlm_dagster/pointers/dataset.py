"""The pointer dataset: create it, seal windows of requests into it, hand it to a loader."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa

from vlm_dagster.engines import Engine
from vlm_dagster.errors import InvalidRequestsError, PinError, SchemaError, WindowError
from vlm_dagster.history.snapshot import Snapshot, SnapshotRef
from vlm_dagster.pointers.build import PointerBuilder
from vlm_dagster.pointers.snapshot import PointerRef, PointerSnapshot, pins_of_window
from vlm_dagster.pointers.spec import PointerSpec
from vlm_dagster.pointers.validate import check_watermarks, validated_requests
from vlm_dagster.retention.referrers import Referrer
from vlm_dagster.schema import Trait
from vlm_dagster.sealed import (
    Sealed,
    SealedTable,
    SealedWindow,
    StagedWindow,
    TableSpec,
    TableState,
)
from vlm_dagster.sealed.duplicates import DuplicateFilter
from vlm_dagster.sealed.incoming import Rows
from vlm_dagster.sealed.owner import WindowedTable, check_num_buckets
from vlm_dagster.sealed.retired import kept_versions
from vlm_dagster.windows import Cadence, Window, WindowGrid, format_us

__all__ = ["PointerDataset"]


class PointerDataset(WindowedTable):
    """Training examples, each with pointers into pinned histories. Sealed window by window."""

    def __init__(self, table: SealedTable, spec: PointerSpec, engine: Engine | None = None) -> None:
        super().__init__(table, engine)
        self.spec = spec
        self._entered: set[str] = set()

    @classmethod
    def create(
        cls,
        uri: str | os.PathLike[str],
        groups: Sequence[str],
        columns: Sequence[Trait] = (),
        *,
        name: str = "pointers",
        request: Literal["event_id", "request_time"] = "event_id",
        target_group: str | None = None,
        max_length: int | None = None,
        user_id: pa.DataType | None = None,
        request_id: pa.DataType | None = None,
        duplicates: Literal["refuse", "first"] = "refuse",
        num_buckets: int = 16,
        windows: Cadence = "daily",
        start: str | None = None,
        storage_options: Mapping[str, str] | None = None,
        engine: Engine | None = None,
    ) -> PointerDataset:
        """Create the dataset, or open it if it is there already with the same declaration.

        Args:
            groups: the feature groups whose histories its examples need.
            columns: labels and candidate features that every example carries.
            num_buckets: best the same as the histories', so that one unit reads one bucket of each.
            (The rest: see `PointerSpec` and `HistoryStore.create`.)
        """
        spec = PointerSpec(
            name,
            groups,
            columns,
            request=request,
            target_group=target_group,
            max_length=max_length,
            user_id=user_id,
            request_id=request_id,
            duplicates=duplicates,
        )
        return cls.create_from(
            uri,
            spec,
            num_buckets=num_buckets,
            windows=windows,
            start=start,
            storage_options=storage_options,
            engine=engine,
        )

    @classmethod
    def create_from(
        cls,
        uri: str | os.PathLike[str],
        spec: PointerSpec,
        *,
        num_buckets: int = 16,
        windows: Cadence = "daily",
        start: str | None = None,
        storage_options: Mapping[str, str] | None = None,
        engine: Engine | None = None,
    ) -> PointerDataset:
        """`create`, from a declaration that is at hand already."""
        check_num_buckets(num_buckets)
        declared = _table_spec(spec, num_buckets, WindowGrid(windows), start)
        table = SealedTable.create(os.fspath(uri), declared, storage_options)
        return cls(table, spec, engine)

    @classmethod
    def open(
        cls,
        uri: str | os.PathLike[str],
        *,
        storage_options: Mapping[str, str] | None = None,
        engine: Engine | None = None,
    ) -> PointerDataset:
        """Open an existing pointer dataset, or TableError."""
        table = SealedTable.open(os.fspath(uri), "pointers", _revive, storage_options)
        return cls(table, PointerSpec.from_json(table.spec.details["pointers"]), engine)

    # -- sealing ------------------------------------------------------------------------------

    def seal(
        self,
        window: str | Window,
        requests: Rows,
        histories: Mapping[str, Snapshot | SnapshotRef],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> Sealed:
        """Resolve the requests of one window into pointers and store these, once.

        Args:
            window: its key; every request was made in it.
            requests: `user_id`, then `event_id`, or `request_id` and `request_time`, then the
                declared columns; in any order.
            histories: the snapshot of each group to pin.

        Raises:
            WatermarkError: a request lies beyond a snapshot's watermark.
            WindowSealedError: the window is sealed with other content.
            SchemaError, InvalidRequestsError: the requests do not fit; nothing was written.
            TableError: a history cannot be told that this dataset refers to it.
        """
        return self.commit(self.stage(window, requests, histories, progress=progress))

    def stage(
        self,
        window: str | Window,
        requests: Rows,
        histories: Mapping[str, Snapshot | SnapshotRef],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> StagedWindow:
        """The first half of `seal`: resolve, sort and write files that nobody sees yet."""
        state = self._table.state()
        checked = self._table.check_window(window, state)
        snapshots = self._snapshots(histories)
        if self.spec.request == "event_id":
            # Whichever events are asked for, all of the window has to be there to find them.
            check_watermarks(snapshots, checked.end_us, f"window {checked.key}")
        if checked.index not in state.sealed:
            _check_not_dropped(checked, snapshots)
        else:
            _check_same_histories(
                self.uri, state.sealed[checked.index], snapshots, self._table.storage_options
            )
        self._enter(snapshots)
        builder = PointerBuilder(self.spec, checked, snapshots)
        duplicates = DuplicateFilter("request_id", self.spec.duplicates, InvalidRequestsError)
        rows = validated_requests(
            self.spec, self.grid, checked, self.num_buckets, snapshots, requests, progress
        )
        return self._table.stage(
            checked,
            state,
            rows,
            self.spec.request_schema,
            engine=self._engine,
            finish=lambda chunks: builder(duplicates(chunks)),
            facts={"pins": {group: s.ref().to_json() for group, s in snapshots.items()}},
            counts=lambda: {
                "num_duplicates": duplicates.num_duplicates,
                "num_empty": builder.num_empty,
                "num_unknown": builder.num_unknown,
            },
        )

    def _enter(self, snapshots: Mapping[str, Snapshot]) -> None:
        """Enter this dataset among the referrers of the histories, before anything refers to them."""
        for snapshot in snapshots.values():
            if snapshot.uri not in self._entered:
                snapshot.enter(Referrer.pointers(self.uri, self.table_id))
                self._entered.add(snapshot.uri)

    def _snapshots(self, histories: Mapping[str, Snapshot | SnapshotRef]) -> dict[str, Snapshot]:
        if set(histories) != set(self.spec.groups):
            raise SchemaError(
                f"histories were given for {sorted(histories)}, but pointer dataset "
                f"{self.spec.name!r} points into {sorted(self.spec.groups)}",
                "Give one snapshot of each.",
            )
        opened = {}
        for group in self.spec.groups:
            given = histories[group]
            snapshot = (
                given.open(self._table.storage_options) if isinstance(given, SnapshotRef) else given
            )
            if snapshot.group.name != group:
                raise SchemaError(
                    f"the history given for {group!r} is one of {snapshot.group.name!r}",
                    "Give each group its own.",
                )
            if snapshot.group.user_id != self.spec.user_id:
                raise SchemaError(
                    f"users of {group!r} are {snapshot.group.user_id}, those of the requests "
                    f"{self.spec.user_id}",
                    "Declare the pointer dataset with the same user_id type.",
                )
            is_target = group == self.spec.target_group and self.spec.request == "event_id"
            if is_target and snapshot.group.event_id != self.spec.request_id:
                raise SchemaError(
                    f"event ids of {group!r} are {snapshot.group.event_id}, those requested "
                    f"{self.spec.request_id}",
                    "Declare the pointer dataset with that request_id type.",
                )
            opened[group] = snapshot
        return opened

    # -- versions -----------------------------------------------------------------------------

    def state(self, version: int | None = None) -> TableState:
        """What is sealed at a version (the newest if None)."""
        return self._table.state(version)

    def snapshot(
        self, windows: Sequence[str] | None = None, version: int | None = None
    ) -> PointerSnapshot:
        """Some windows at a version.

        Args:
            windows: their keys; None means all that are sealed at that version.
            version: None means the newest now, whose number is then fixed.

        Raises:
            WindowError: a window is not sealed at that version.
        """
        state = self._table.state(version)
        if windows is None:
            chosen = [state.sealed[index] for index in sorted(state.sealed)]
        else:
            wanted = sorted({self.grid.parse(key) for key in windows})
            for window in wanted:
                if window.index not in state.sealed:
                    raise WindowError(
                        window.key,
                        f"not sealed in {self.uri} at version {state.version}",
                        "Seal it, or leave it out.",
                    )
            chosen = [state.sealed[window.index] for window in wanted]
        return PointerSnapshot(self._table, self.spec, state, chosen)

    def ref(self, windows: Sequence[str] | None = None, version: int | None = None) -> PointerRef:
        """A pin of some windows at a version; see `snapshot`."""
        return self.snapshot(windows, version).ref()

    def _ref(self, version: int | None) -> PointerRef:
        return self.ref(version=version)

    def pinned_as(self, name: str) -> PointerSnapshot:
        """What a named pin names, or PinError; see `pin`."""
        return self.pinned(PointerRef.from_json(self.find_pin(name).ref))

    def pinned(self, pin: PointerRef) -> PointerSnapshot:
        """What a pin of this dataset names; see `PointerRef.open`.

        Raises:
            PinError: what lies here is another dataset, or no version that is kept holds it.
        """
        if self.table_id != pin.table_id:
            raise PinError(
                f"pointer dataset {self.uri}",
                pinned=f"table id {pin.table_id}",
                found=f"table id {self.table_id}",
                way_out="The dataset was recreated since; restore the pinned one.",
            )
        newest = self._table.state()
        retired = pin.version in newest.retired
        found = ""
        # A retired version's examples are in every later one, unless a window was corrected.
        for version in kept_versions(self._table, newest) if retired else [pin.version]:
            try:
                snapshot = self.snapshot(windows=pin.windows, version=version)
            except WindowError:  # an older version that is kept has fewer windows
                if not retired:
                    raise
                continue
            found = found or snapshot.digest
            if snapshot.digest == pin.digest:
                return snapshot
        raise PinError(
            f"pointer dataset {self.uri} at version {pin.version}",
            pinned=f"digest {pin.digest}",
            found=f"digest {found}",
            way_out="Its version was retired, and later ones hold corrected content: use these."
            if retired
            else "Its log was altered; restore it from a copy.",
        )


def _check_not_dropped(window: Window, snapshots: Mapping[str, Snapshot]) -> None:
    """Of dropped windows only the number of each user's events is known, not how many of them came
    before a request."""
    for group, snapshot in snapshots.items():
        drops = [one.through for one in snapshot.removals if one.kind == "drop"]
        ends = [snapshot.grid.parse(key).end_us for key in drops]
        if ends and window.start_us < max(ends):
            raise WindowError(
                window.key,
                f"lies where the history of {group!r} was dropped by age",
                f"Pointers can be built from {format_us(max(ends))} on.",
            )


def _check_same_histories(
    uri: str,
    sealed: SealedWindow,
    snapshots: Mapping[str, Snapshot],
    options: Mapping[str, str] | None,
) -> None:
    """A sealed window may be sealed again with a later snapshot only if that goes on from the
    pinned one: the pointers would be equal, but not what they point at."""
    for group, pin in pins_of_window(sealed).items():
        snapshot = snapshots[group]
        here = snapshot.ref()
        mark, pinned = pin.watermark_us, pin.digest
        if here.watermark_us is not None and mark is not None and here.watermark_us < mark:
            older = pin.open(options, uri=snapshot.uri)
            mark, pinned = here.watermark_us, older.digest_at(here.watermark_us)
        if here.table_id != pin.table_id or snapshot.digest_at(mark) != pinned:
            raise PinError(
                f"window {sealed.window.key} of {uri}, history {group!r}",
                pinned=f"table {pin.table_id} with digest {pinned}",
                found=f"table {here.table_id} with digest {snapshot.digest_at(mark)}",
                way_out="The window is sealed against another history: keep it, or build a new "
                "pointer dataset.",
            )


def _table_spec(
    spec: PointerSpec, num_buckets: int, grid: WindowGrid, start: str | None
) -> TableSpec:
    return TableSpec(
        kind="pointers",
        name=spec.name,
        columns=spec.schema,
        sort_columns=("user_id", "request_time", "request_id"),
        num_buckets=num_buckets,
        grid=grid,
        start=None if start is None else grid.parse(start),
        details={"pointers": spec.to_json()},
        extremes=spec.extremes,
    )


def _revive(declared: dict[str, Any]) -> TableSpec:
    return _table_spec(
        PointerSpec.from_json(declared["pointers"]),
        declared["num_buckets"],
        WindowGrid(declared["windows"]),
        declared["start"],
    )
