"""What a landing is on disk: a manifest, and one Parquet file for each window that has events."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlm_dagster.errors import TableError
from vlm_dagster.hashing import Digest, digest_rows
from vlm_dagster.windows import Window

__all__ = ["LandedWindow", "check_files", "read_manifest", "write_manifest", "write_window"]

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


def write_window(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Digest:
    """Write the rows of one window to a file, and return their digest."""
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


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a landing, or TableError if the folder is none, or of another release."""
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


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Say what a folder holds; it is a landing from now on."""
    whole = {"format": _FORMAT, "version": _VERSION, **manifest}
    (folder / _MANIFEST).write_text(json.dumps(whole, indent=1) + "\n")


def check_files(folder: Path, landed: Iterable[LandedWindow]) -> None:
    """TableError if a file is missing or has another size than when it was landed."""
    for entry in landed:
        try:
            size = (folder / entry.path).stat().st_size
        except FileNotFoundError:
            raise TableError(str(folder), f"file {entry.path} is missing", _AGAIN) from None
        if size != entry.num_bytes:
            raise TableError(
                str(folder),
                f"file {entry.path} has {size:,} bytes instead of {entry.num_bytes:,}",
                _AGAIN,
            )
