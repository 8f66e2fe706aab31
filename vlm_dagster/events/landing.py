"""The landing zone: a source's events, one Parquet file a window, ready to be sealed one by one.

A landing is a folder with `landing.json` and, for each window that has events, one file in
`windows/`. It is built aside and renamed, so a folder with a manifest is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from vlm_dagster.errors import SourceFormatError, TableError
from vlm_dagster.events.directories import alone, building, put_in_place
from vlm_dagster.events.landed import (
    LandedWindow,
    check_files,
    read_manifest,
    write_manifest,
    write_window,
)
from vlm_dagster.events.source import BinaryLabel, EventSource, Progress, input_schema
from vlm_dagster.events.splitting import WindowSplitter
from vlm_dagster.hashing import Digest
from vlm_dagster.schema import FeatureGroup
from vlm_dagster.windows import Window, WindowGrid

__all__ = ["Landing", "land"]


@dataclass(frozen=True)
class Landing:
    """A landed source.

    Attributes:
        directory: the folder.
        group: what the events are.
        grid: which windows they were split into: by `available_at` where the group records it,
            by `event_time` otherwise.
        label: the source's binary label, if it has one.
        num_events, num_dropped: events landed, and lines dropped by the declared policy.
        first_us, last_us: the first and last instant by which events were assigned to windows;
            None if there are no events.
        digest: of all events, whatever their order and however they are split.
        landed: the windows that have events, oldest first.
        reused: whether `land` found this landing already made.
    """

    directory: Path
    group: FeatureGroup
    grid: WindowGrid
    label: BinaryLabel | None
    num_events: int
    num_dropped: int
    first_us: int | None
    last_us: int | None
    digest: str
    landed: tuple[LandedWindow, ...]
    reused: bool = False
    _by_key: dict[str, LandedWindow] = field(
        init=False, default_factory=dict, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        self._by_key.update({landed.window.key: landed for landed in self.landed})

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Landing:
        """Open a folder that `land` made.

        Raises:
            TableError: it is missing, not a landing, newer than this code, or lost files.
        """
        folder = Path(directory)
        manifest = read_manifest(folder)
        grid = WindowGrid(manifest["cadence"])
        landed = tuple(
            LandedWindow(**{**entry, "window": grid.parse(entry["window"])})
            for entry in manifest["windows"]
        )
        check_files(folder, landed)
        label = manifest["label"]
        return cls(
            directory=folder,
            group=FeatureGroup.from_json(manifest["group"]),
            grid=grid,
            label=None if label is None else BinaryLabel(**label),
            num_events=manifest["num_events"],
            num_dropped=manifest["num_dropped"],
            first_us=manifest["first_us"],
            last_us=manifest["last_us"],
            digest=manifest["digest"],
            landed=landed,
        )

    @property
    def windows(self) -> list[Window]:
        """Every window from the first to the last that has events, the empty ones between too."""
        if self.first_us is None or self.last_us is None:
            return []
        return self.grid.between(self.first_us, self.last_us + 1)

    def events(self, window: str | Window) -> list[str]:
        """Paths of the Parquet files with this window's events in the source's order; `[]` if it
        has none.

        Raises:
            WindowError: no window of this cadence has that key.
        """
        landed = self._by_key.get(self.grid.parse(window).key)
        return [] if landed is None else [str(self.directory / landed.path)]

    def num_events_in(self, window: str | Window) -> int:
        """How many events this window has."""
        landed = self._by_key.get(self.grid.parse(window).key)
        return 0 if landed is None else landed.num_events

    def problems(self) -> list[str]:
        """Read every file and say which are not what was written. Empty means all is well."""
        found = []
        for entry in self.landed:
            with (self.directory / entry.path).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                    found.append(f"{entry.path}: its bytes changed since it was landed")
        return found


def land(
    source: EventSource,
    directory: str | os.PathLike[str],
    grid: WindowGrid,
    progress: Progress | None = None,
    *,
    max_buffered_bytes: int = 128 << 20,
) -> Landing:
    """Read a source once and split it by window into `directory`.

    A landing of the same files (path, size, time of change), options and windows is reused.
    One of another source is replaced: a landing is only a copy.

    Args:
        progress: called with the input bytes read so far, up to `source.num_bytes`.
        max_buffered_bytes: events held in memory; beyond it they go through scratch files.

    Raises:
        SourceFormatError: the source is malformed. Nothing was written.
        TableError: `directory` holds something that is not a landing. It was left alone.
        StorageError: the disk refused, e.g. because it is full. Nothing is left behind.
    """
    target = Path(directory).absolute()
    fingerprint = _fingerprint(source, grid)
    if found := _same(target, fingerprint):
        return found
    with building(target) as folder:
        _write(source, folder, grid, fingerprint, progress, max_buffered_bytes)
        if _fingerprint(source, grid) != fingerprint:
            raise SourceFormatError(
                ", ".join(source.paths[:3]), "the input changed while it was read",
                line=None, value=None, way_out="Land it again when nobody writes to it.",
            )  # fmt: skip
        with alone(target):
            # Another process may have landed the same meanwhile, and be reading it already.
            if found := _same(target, fingerprint):
                return found
            put_in_place(folder, target)
            return Landing.open(target)


def _same(target: Path, fingerprint: dict[str, Any]) -> Landing | None:
    """What is landed here already, if it is of the same source and whole."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    if read_manifest(target)["fingerprint"] != fingerprint:
        return None
    with contextlib.suppress(TableError):  # it lost files: land again
        return replace(Landing.open(target), reused=True)
    return None


def _fingerprint(source: EventSource, grid: WindowGrid) -> dict[str, Any]:
    files = []
    for path in source.paths:
        stat = os.stat(path)
        files.append([os.path.abspath(path), stat.st_size, stat.st_mtime_ns])
    found: dict[str, Any] = json.loads(
        json.dumps(
            {
                "files": files,
                "options": source.options(),
                "group": source.group.to_json(),
                "cadence": grid.cadence,
            }
        )
    )
    return found


def _write(
    source: EventSource,
    folder: Path,
    grid: WindowGrid,
    fingerprint: dict[str, Any],
    progress: Progress | None,
    max_buffered_bytes: int,
) -> None:
    schema = input_schema(source.group)
    time = "available_at" if source.group.availability == "recorded" else "event_time"
    scratch = folder / "scratch"
    scratch.mkdir()
    (folder / "windows").mkdir()
    splitter = WindowSplitter(schema, time, grid, scratch, max_buffered_bytes)
    num_read = 0
    for batch in source.batches(progress):
        _refuse_null_times(source, batch, time, num_read)
        splitter.add(batch)
        num_read += batch.num_rows
    digests: list[Digest] = []
    entries: list[dict[str, Any]] = []
    for index, batches in splitter.windows():
        window = grid.at(index)
        path = f"windows/{window.segment}.parquet"
        digest = write_window(folder / path, schema, batches)
        digests.append(digest)
        with (folder / path).open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        size = (folder / path).stat().st_size
        entries.append(
            LandedWindow(window, path, digest.num_rows, size, sha256, str(digest)).to_json()
        )
    for run in scratch.iterdir():
        run.unlink()
    scratch.rmdir()
    manifest = {
        "fingerprint": fingerprint,
        "group": source.group.to_json(),
        "label": None if source.label is None else source.label.to_json(),
        "cadence": grid.cadence,
        "num_events": num_read,
        "num_dropped": source.num_dropped,
        "num_source_bytes": source.num_bytes,
        "first_us": splitter.first_us,
        "last_us": splitter.last_us,
        "digest": str(Digest.sum(digests)),
        "windows": entries,
    }
    write_manifest(folder, manifest)


def _refuse_null_times(
    source: EventSource, batch: pa.RecordBatch, time: str, num_before: int
) -> None:
    column = batch.column(time)
    if column.null_count:
        row = column.is_null().index(True).as_py()
        raise SourceFormatError(
            source.paths[0] if len(source.paths) == 1 else "the source",
            f"event {num_before + row:,} (from 0) has no {time}, so it belongs to no window",
            line=None, value=None, way_out="Repair or remove the row. Nothing was written.",
        )  # fmt: skip
