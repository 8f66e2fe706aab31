"""What lies at an address: a history table, a pointer dataset or a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vlm_dagster.errors import TableError
from vlm_dagster.history import HistoryStore
from vlm_dagster.pointers import PointerDataset
from vlm_dagster.sealed.opening import table_kind
from vlm_dagster.storage import normalize_uri
from vlm_dagster.training.checkpoint import MANIFEST, Manifest, read_manifest

__all__ = [
    "CheckpointFolder",
    "Opened",
    "history_of",
    "open_any",
    "parse_storage_options",
    "table_of",
]


@dataclass(frozen=True)
class CheckpointFolder:
    """A checkpoint, by what its manifest says."""

    path: str
    manifest: Manifest


Opened = HistoryStore | PointerDataset | CheckpointFolder


def open_any(uri: str, storage_options: Mapping[str, str] | None = None) -> Opened:
    """Open whatever of ours lies there.

    Raises:
        TableError: nothing of ours does.
    """
    address = normalize_uri(uri)
    if "://" not in address:
        path = Path(address)
        if path.name == MANIFEST:
            path = path.parent
        if (path / MANIFEST).exists():
            return CheckpointFolder(str(path), read_manifest(path))
        if not path.exists():
            raise TableError(address, "there is nothing here", "Check the path.")
    if table_kind(address, storage_options) == "history":
        return HistoryStore.open(address, storage_options=storage_options)
    return PointerDataset.open(address, storage_options=storage_options)


def parse_storage_options(pairs: list[str]) -> dict[str, str] | None:
    """`KEY=VALUE` words as storage options."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            # Not quoted back: it may be a secret.
            raise TableError("--storage-option", "not KEY=VALUE", "Write it like region=eu-west-1.")
        found[key] = value
    return found or None


def table_of(opened: Opened, uri: str) -> HistoryStore | PointerDataset:
    """The table at an address, or TableError."""
    if isinstance(opened, CheckpointFolder):
        raise TableError(uri, "this is a checkpoint, no table", "Give the address of a table.")
    return opened


def history_of(opened: Opened, uri: str) -> HistoryStore:
    """The history table at an address, or TableError."""
    if not isinstance(opened, HistoryStore):
        raise TableError(uri, "this is not a history table", "Give the address of one.")
    return opened
