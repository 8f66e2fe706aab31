"""The pointer dataset: create it, seal windows of requests into it, hand it to a loader."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from vlm_dagster.engines import Engine
from vlm_dagster.engines.local import LocalEngine
from vlm_dagster.errors import InvalidRequestsError, PinError, SchemaError, WindowError
from vlm_dagster.history.arena import BucketIndex
from vlm_dagster.history.snapshot import Snapshot, SnapshotRef, prefix_digest
from vlm_dagster.history.store import check_num_buckets
from vlm_dagster.pointers.build import PointerBuilder
from vlm_dagster.pointers.spec import PointerSpec
from vlm_dagster.pointers.validate import check_watermarks, validated_requests
from vlm_dagster.schema import Trait
from vlm_dagster.sealed import (
    Sealed,
    SealedTable,
    SealedWindow,
    StagedWindow,
    TableSpec,
    TableState,
    commit_window,
)
from vlm_dagster.sealed.duplicates import DuplicateFilter
from vlm_dagster.sealed.incoming import Rows
from vlm_dagster.sealed.sweep import DEFAULT_GRACE_S, sweep
from vlm_dagster.sealed.verify import VerifyReport, verify
from vlm_dagster.storage import FileInfo, redact
from vlm_dagster.windows import Cadence, Window, WindowGrid

__all__ = ["PointerDataset", "PointerRef", "PointerSnapshot"]


@dataclass(frozen=True)
class PointerRef:
    """A pin: names some windows of a pointer dataset at one version.

    Picklable and JSON-able; holds no credentials.

    Attributes:
        windows: their keys, oldest first.
        digest: `prefix_digest` of these windows.
        pins: the distinct history snapshots that these windows point into.
    """

    uri: str
    table_id: str
    version: int
    windows: tuple[str, ...]
    digest: str
    pins: tuple[SnapshotRef, ...]

    def open(
        self, storage_options: Mapping[str, str] | None = None, *, uri: str | None = None
    ) -> PointerSnapshot:
        """Open the pinned windows, refusing anything that is not them.

        Raises:
            TableError: the dataset or the version is gone.
            PinError: what lies there is another dataset, or holds other content.
        """
        dataset = PointerDataset.open(uri or self.uri, storage_options=storage_options)
        if dataset.table_id != self.table_id:
            raise PinError(
                f"pointer dataset {dataset.uri}",
                pinned=f"table id {self.table_id}",
                found=f"table id {dataset.table_id}",
                way_out="The dataset was recreated since; restore the pinned one.",
            )
        snapshot = dataset.snapshot(windows=self.windows, version=self.version)
        if snapshot.digest != self.digest:
            raise PinError(
                f"pointer dataset {dataset.uri} at version {self.version}",
                pinned=f"digest {self.digest}",
                found=f"digest {snapshot.digest}",
                way_out="Its log was altered; restore it from a copy.",
            )
        return snapshot

    def to_json(self) -> dict[str, Any]:
        return {
            "uri": redact(self.uri),
            "table_id": self.table_id,
            "version": self.version,
            "windows": list(self.windows),
            "digest": self.digest,
            "pins": [pin.to_json() for pin in self.pins],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PointerRef:
        return cls(
            uri=value["uri"],
            table_id=value["table_id"],
            version=value["version"],
            windows=tuple(value["windows"]),
            digest=value["digest"],
            pins=tuple(SnapshotRef.from_json(pin) for pin in value["pins"]),
        )


class PointerSnapshot:
    """Some windows of a pointer dataset at one version: what an epoch of training goes over."""

    def __init__(
        self, table: SealedTable, spec: PointerSpec, version: int, windows: list[SealedWindow]
    ) -> None:
        self._table = table
        self.spec = spec
        self.version = version
        self.windows = windows
        self._segments = [sealed.window.segment for sealed in windows]

    @property
    def uri(self) -> str:
        return self._table.uri

    @property
    def num_buckets(self) -> int:
        return self._table.spec.num_buckets

    @property
    def num_examples(self) -> int:
        return sum(sealed.num_rows for sealed in self.windows)

    @cached_property
    def digest(self) -> str:
        """One digest of all examples of these windows."""
        return prefix_digest(self.windows)

    def pins_of(self, window: str) -> dict[str, SnapshotRef]:
        """The history snapshots, by group, that one window points into."""
        for sealed in self.windows:
            if sealed.window.key == window:
                return _pins(sealed)
        raise WindowError(window, f"not among the windows of {self.uri} read here", "Name one.")

    def pins(self) -> dict[str, tuple[SnapshotRef, ...]]:
        """The distinct history snapshots of each group, oldest version first."""
        found: dict[str, set[SnapshotRef]] = {group: set() for group in self.spec.groups}
        for sealed in self.windows:
            for group, pin in _pins(sealed).items():
                found[group].add(pin)
        return {
            group: tuple(sorted(pins, key=lambda p: (p.version, p.uri)))
            for group, pins in found.items()
        }

    def ref(self) -> PointerRef:
        """The pin that names these windows."""
        return PointerRef(
            uri=self.uri,
            table_id=self._table.table_id,
            version=self.version,
            windows=tuple(sealed.window.key for sealed in self.windows),
            digest=self.digest,
            pins=tuple(pin for pins in self.pins().values() for pin in pins),
        )

    def files(self) -> pa.Table:
        """The files behind these windows: path, segment, bucket, num_rows, size_bytes."""
        files = self._table.files(self.version)
        return files.filter(pc.is_in(files["segment"], pa.array(self._segments, pa.string())))

    def users_of_bucket(self, bucket: int) -> pa.Array:
        """The users with an example in a bucket, sorted and distinct."""
        paths = self._table.paths(self.version, bucket, self._segments)
        found = [self._table.reader(path, self.version).users.user_ids for path in paths]
        if not found:
            return pa.array([], self.spec.user_id)
        return pa.concat_arrays(found).unique().sort()

    def bucket_index(self, bucket: int, user_ids: pa.Array) -> BucketIndex:
        """Where the examples of these users (sorted, distinct, all of this bucket) lie; each
        user's examples stand in order of request time."""
        paths = self._table.paths(self.version, bucket, self._segments)
        readers = [self._table.reader(path, self.version) for path in paths]
        return BucketIndex(readers, user_ids, self.spec.schema)

    def to_table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All examples, window by window; sorted by (bucket, user, time) within each."""
        names = list(columns or self.spec.schema.names)
        schema = pa.schema([self.spec.schema.field(name) for name in names])
        files = self.files()
        by_segment: dict[str, list[str]] = {}
        for segment, path in zip(
            files["segment"].to_pylist(), files["path"].to_pylist(), strict=True
        ):
            by_segment.setdefault(segment, []).append(path)
        tables = [
            self._table.reader(path, self.version).read_groups(names).cast(schema)
            for segment in self._segments
            for path in by_segment.get(segment, [])
        ]
        return pa.concat_tables(tables) if tables else schema.empty_table()

    def verify(
        self, *, deep: bool = False, progress: Callable[[int], None] | None = None
    ) -> VerifyReport:
        """Check that the files are what was sealed; see `vlm_dagster.sealed.verify`."""
        keys = {sealed.window.key for sealed in self.windows}
        return verify(self._table, self.version, windows=keys, deep=deep, progress=progress)


class PointerDataset:
    """Training examples, each with pointers into pinned histories. Sealed window by window."""

    def __init__(self, table: SealedTable, spec: PointerSpec, engine: Engine | None = None) -> None:
        self._table = table
        self.spec = spec
        self._engine: Engine = engine or LocalEngine()

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

    def __repr__(self) -> str:
        return f"PointerDataset({self.uri!r}, {self.spec.name!r})"

    @property
    def uri(self) -> str:
        return self._table.uri

    @property
    def table_id(self) -> str:
        return self._table.table_id

    @property
    def num_buckets(self) -> int:
        return self._table.spec.num_buckets

    @property
    def grid(self) -> WindowGrid:
        return self._table.spec.grid

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
        if checked.index in state.sealed:
            _check_same_histories(
                self.uri, state.sealed[checked.index], snapshots, self._table.storage_options
            )
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

    def commit(self, staged: StagedWindow) -> Sealed:
        """The second half of `seal`: make a staged window visible, at most once."""
        return commit_window(self._table, staged)

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

    def version_sealing(self, window: str | Window) -> int:
        """The version that sealed a window."""
        return self._table.versions.sealing(self.grid.parse(window))

    def versions_sealing(self, windows: Collection[str | Window]) -> dict[str, int]:
        """`version_sealing` of many windows, by key, in one pass over the log."""
        return self._table.versions.all_sealing([self.grid.parse(window) for window in windows])

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
        return PointerSnapshot(self._table, self.spec, state.version, chosen)

    def ref(self, windows: Sequence[str] | None = None, version: int | None = None) -> PointerRef:
        """A pin of some windows at a version; see `snapshot`."""
        return self.snapshot(windows, version).ref()

    def sweep(
        self, *, older_than_s: float = DEFAULT_GRACE_S, dry_run: bool = True
    ) -> list[FileInfo]:
        """Left-over files of killed processes; deleted unless `dry_run`. See `sealed.sweep`."""
        return sweep(self._table, older_than_s=older_than_s, dry_run=dry_run)


def _pins(sealed: SealedWindow) -> dict[str, SnapshotRef]:
    return {group: SnapshotRef.from_json(pin) for group, pin in sealed.facts["pins"].items()}


def _check_same_histories(
    uri: str,
    sealed: SealedWindow,
    snapshots: Mapping[str, Snapshot],
    options: Mapping[str, str] | None,
) -> None:
    """A sealed window may be sealed again with a later snapshot only if that goes on from the
    pinned one: the pointers would be equal, but not what they point at."""
    for group, pin in _pins(sealed).items():
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
