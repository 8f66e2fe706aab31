"""`vlm-dagster lineage`: from a checkpoint, or a pointer dataset, back to the bytes behind it.

Everything shown comes from the pins that were stored with the thing itself, so it holds without
Dagster and without its event log.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow.compute as pc
from rich.console import Console
from rich.tree import Tree

from vlm_dagster.commands.opening import CheckpointFolder, Opened
from vlm_dagster.errors import VlmError
from vlm_dagster.history import HistoryStore, PinOpener, SnapshotRef
from vlm_dagster.pointers import PointerRef
from vlm_dagster.windows import format_us

__all__ = ["show_lineage", "trace"]


def trace(
    opened: Opened,
    *,
    files: bool = False,
    storage_options: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What a thing was made from, recursively, JSON-able; a pin that can no longer be opened says
    so under "problem".

    Args:
        files: name every file of every pinned version too.
    """
    opened_pins = PinOpener(storage_options)
    if isinstance(opened, CheckpointFolder):
        roles = [(role, pin) for role, pin in opened.manifest.pins.items() if pin]
        return {
            "kind": "checkpoint",
            "uri": opened.path,
            "digest": opened.manifest.digest,
            "weights": opened.manifest.weights_file,
            "from": [
                {
                    "role": role,
                    **_pointers(PointerRef.from_json(pin), files, storage_options, opened_pins),
                }
                for role, pin in roles
            ],
        }
    if isinstance(opened, HistoryStore):
        return _history(opened.snapshot().ref(), files, opened_pins)
    return _pointers(opened.ref(), files, storage_options, opened_pins)


def _pointers(
    ref: PointerRef,
    files: bool,
    storage_options: Mapping[str, str] | None,
    opened_pins: PinOpener,
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "kind": "pointers",
        "uri": ref.uri,
        "version": ref.version,
        "digest": ref.digest,
        "windows": list(ref.windows),
    }
    try:
        snapshot = ref.open(storage_options)
        found["num_examples"] = snapshot.num_examples
        found |= _bytes(snapshot.files(), files)
    except VlmError as error:
        found["problem"] = str(error)
    found["from"] = [_history(pin, files, opened_pins) for pin in ref.pins]
    return found


def _history(
    pin: SnapshotRef,
    files: bool,
    opened_pins: PinOpener,
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "kind": "history",
        "group": pin.group,
        "uri": pin.uri,
        "version": pin.version,
        "digest": pin.digest,
        "watermark": None if pin.watermark_us is None else format_us(pin.watermark_us),
    }
    try:
        snapshot = opened_pins(pin)
        found["num_events"] = snapshot.num_events
        found["num_windows"] = len(snapshot.windows)
        found |= _bytes(snapshot.files(), files)
    except VlmError as error:
        found["problem"] = str(error)
    return found


def _bytes(table: Any, files: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "num_files": table.num_rows,
        "num_bytes": pc.sum(table["size_bytes"]).as_py() or 0,
    }
    if files:
        found["files"] = table["path"].to_pylist()
    return found


def show_lineage(found: dict[str, Any], console: Console) -> None:
    """Print what `trace` found, as a tree."""
    console.print(_tree(found))


_MOST_SHOWN = 6


def _tree(node: dict[str, Any], parent: Tree | None = None) -> Tree:
    role = f"{node['role']}: " if "role" in node else ""
    name = node.get("group") or node["kind"]
    version = f" version {node['version']}" if "version" in node else ""
    label = f"{role}[bold]{name}[/bold]{version}  {node['uri']}"
    tree = Tree(label) if parent is None else parent.add(label)
    tree.add(f"digest {node['digest']}")
    if "windows" in node:
        keys = node["windows"]
        span = keys[0] if len(keys) == 1 else f"{keys[0]} ... {keys[-1]}" if keys else "none"
        tree.add(f"{len(keys):,} windows: {span}; {node.get('num_examples', 0):,} examples")
    if "num_events" in node:
        tree.add(
            f"complete up to {node['watermark']}: {node['num_windows']:,} windows, "
            f"{node['num_events']:,} events"
        )
    if "num_files" in node:
        held = tree.add(f"{node['num_files']:,} files, {node['num_bytes']:,} bytes")
        for path in node.get("files", []):
            held.add(path)
    if "problem" in node:
        tree.add(f"[red]{node['problem']}[/red]")
    parents = node.get("from", [])
    shown = parents if len(parents) <= _MOST_SHOWN else [*parents[:2], *parents[-2:]]
    for i, source in enumerate(shown):
        if len(shown) < len(parents) and i == 2:
            tree.add(f"... {len(parents) - 4:,} more pinned versions ...")
        _tree(source, tree)
    return tree
