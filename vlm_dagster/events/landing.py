"""The landing zone: a source's events, one Parquet file a window, ready to be sealed one by one.

A landing is a folder with `landing.json` and, for each window that has events, one file in
`windows/`. It is built aside and renamed, so a folder with a manifest is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlm_dagster.errors import SourceFormatError, TableError
from vlm_dagster.events.directories import building, put_in_place
from vlm_dagster.events.source import BinaryLabel, EventSource, Progress, input_schema
from vlm_dagster.events.splitting import WindowSplitter
from vlm_dagster.hashing import Digest, digest_rows
from vlm_dagster.schema import FeatureGroup
from vlm_dagster.windows import Window, WindowGrid

__all__ = ["LandedWindow", "Landing", "land"]

_FORMAT = "vlm-dagster landing"
_VERSION = 1
_MANIFEST = "landing.json"
_ROW_GROUP_ROWS = 131_072
_AGAIN = "Delete the folder and land the source again."


@dataclass(frozen=True)
class LandedWindow:
    """One window that has events: its file, relative to the landing, and what the file holds.
    `num_bytes` and `sha256` are of the file, `digest` is of the rows in any order."""

    window: Window
    path: str
    num_events: int
    num_bytes: int
    sha256: str
    digest: str

    def to_json(self) -> dict[str, Any]:
        return {
            "window": self.window.key,
            "path": self.path,
            "num_events": self.num_events,
            "num_bytes": self.num_bytes,
            "sha256": self.sha256,
            "digest": self.digest,
        }


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
        manifest = _read_manifest(folder)
        grid = WindowGrid(manifest["cadence"])
        landed = tuple(
            LandedWindow(grid.parse(entry["window"]), *(entry[name] for name in _ENTRY))
            for entry in manifest["windows"]
        )
        for entry in landed:
            _check_file(folder, entry)
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


_ENTRY = ("path", "num_events", "num_bytes", "sha256", "digest")


def land(
    source: EventSource,
    directory: str | os.PathLike[str],
    grid: WindowGrid,
    progress: Progress | None = None,
    *,
    max_buffered_bytes: int = 256 << 20,
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
    if target.exists() and (target.is_file() or any(target.iterdir())):
        manifest = _read_manifest(target)
        if manifest["fingerprint"] == fingerprint:
            with contextlib.suppress(TableError):  # files lost: land again
                return _reused(target)
    with building(target) as folder:
        _write(source, folder, grid, fingerprint, progress, max_buffered_bytes)
        try:
            put_in_place(folder, target)
        except FileExistsError:
            # Another process landed at the same time. If it landed the same, that is as good.
            if _read_manifest(target)["fingerprint"] != fingerprint:
                raise TableError(
                    str(target), "another process landed another source here meanwhile",
                    "Give each source a folder of its own.",
                ) from None  # fmt: skip
            return _reused(target)
    return Landing.open(target)


def _reused(target: Path) -> Landing:
    return replace(Landing.open(target), reused=True)


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
        digest = _write_file(folder / path, schema, batches)
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
        "format": _FORMAT,
        "version": _VERSION,
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
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


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


def _write_file(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Digest:
    total = Digest()
    with pq.ParquetWriter(path, schema, compression="lz4", use_dictionary=False) as writer:
        for group in _row_groups(batches):
            total += _digest(group)
            writer.write_batch(group, row_group_size=_ROW_GROUP_ROWS)
    return total


def _row_groups(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in row groups of one size, so that a file's bytes do not depend on how its
    rows were buffered."""
    waiting: list[pa.RecordBatch] = []
    num_waiting = 0
    for batch in batches:
        while num_waiting + batch.num_rows >= _ROW_GROUP_ROWS:
            cut = _ROW_GROUP_ROWS - num_waiting
            yield pa.concat_batches([*waiting, batch.slice(0, cut)])
            waiting, num_waiting, batch = [], 0, batch.slice(cut)
        waiting.append(batch)
        num_waiting += batch.num_rows
    if num_waiting:
        yield pa.concat_batches(waiting)


def _digest(batch: pa.RecordBatch) -> Digest:
    """The digest of rows that may hold nulls, however they are cut into batches."""
    if not any(column.null_count for column in batch.columns):
        return digest_rows(batch)
    any_null = reduce(pc.or_, (column.is_null() for column in batch.columns))
    columns: dict[str, pa.Array] = {}
    with_nulls = batch.filter(any_null)
    for name, column in zip(batch.schema.names, with_nulls.columns, strict=True):
        kind = column.type
        zero: Any = "" if pa.types.is_string(kind) else pa.scalar(0, pa.int64()).cast(kind)
        columns[name] = column.fill_null(zero)
        columns[f"{name} is null"] = column.is_null()
    return digest_rows(batch.filter(pc.invert(any_null))) + digest_rows(
        pa.RecordBatch.from_pydict(columns)
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        what = "is a file, not a landing" if folder.exists() else "there is no landing here"
        raise TableError(str(folder), what, "Land a source there first, or give another path.")
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
    except FileNotFoundError:
        raise TableError(
            str(folder), f"is not a landing: it has no {_MANIFEST}",
            "It was left alone. Give an empty or a new folder.",
        ) from None  # fmt: skip
    except (ValueError, UnicodeDecodeError):
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise TableError(
            str(folder), f"is not a landing: its {_MANIFEST} is not one of ours, or was cut off",
            "It was left alone. Give a new folder, or delete this one.",
        )  # fmt: skip
    if manifest.get("version") != _VERSION:
        raise TableError(
            str(folder), f"was made by another release (version {manifest.get('version')!r}; this "
            f"one reads {_VERSION})", _AGAIN,
        )  # fmt: skip
    return manifest


def _check_file(folder: Path, entry: LandedWindow) -> None:
    try:
        size = (folder / entry.path).stat().st_size
    except FileNotFoundError:
        raise TableError(str(folder), f"file {entry.path} is missing", _AGAIN) from None
    if size != entry.num_bytes:
        raise TableError(
            str(folder), f"file {entry.path} has {size:,} bytes instead of {entry.num_bytes:,}",
            _AGAIN,
        )  # fmt: skip
