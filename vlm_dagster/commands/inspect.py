"""`vlm-dagster inspect`: what a table or a checkpoint holds, for a person or as JSON."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from vlm_dagster.commands.opening import CheckpointFolder, Opened
from vlm_dagster.errors import WindowError
from vlm_dagster.history import HistoryStore
from vlm_dagster.pointers import PointerDataset
from vlm_dagster.sealed import SealedWindow
from vlm_dagster.windows import format_us

__all__ = ["describe", "show"]


def describe(
    opened: Opened, version: int | None = None, window: str | None = None
) -> dict[str, Any]:
    """All that is known without reading rows, JSON-able.

    Args:
        version: of a table; the newest if None.
        window: only this window of a table, with its files.
    """
    if isinstance(opened, CheckpointFolder):
        manifest = opened.manifest
        return {
            "kind": "checkpoint",
            "uri": opened.path,
            "digest": manifest.digest,
            "weights_file": manifest.weights_file,
            "weights_digest": manifest.weights_digest,
            "num_items": manifest.num_items,
            "metrics": dict(manifest.metrics),
            "model": dict(manifest.model_config),
            "environment": dict(manifest.environment),
            "pins": dict(manifest.pins),
        }
    if isinstance(opened, HistoryStore):
        return _describe_history(opened, version, window)
    return _describe_pointers(opened, version, window)


def _describe_history(
    store: HistoryStore, version: int | None, window: str | None
) -> dict[str, Any]:
    snapshot = store.snapshot(version)
    past = snapshot.windows_past_watermark
    files = snapshot.files(past_watermark=True)
    return {
        "kind": "history",
        "uri": store.uri,
        "table_id": store.table_id,
        "version": snapshot.version,
        "group": store.group.to_json(),
        "num_buckets": store.num_buckets,
        "window_length": store.grid.cadence,
        "watermark": snapshot.watermark,
        "digest": snapshot.digest,
        "num_events": snapshot.num_events,
        "num_windows": len(snapshot.windows),
        "num_windows_past_watermark": len(past),
        "num_files": files.num_rows,
        "num_bytes": pc.sum(files["size_bytes"]).as_py() or 0,
        "windows": _windows([*snapshot.windows, *past], files.to_pylist(), window),
    }


def _describe_pointers(
    dataset: PointerDataset, version: int | None, window: str | None
) -> dict[str, Any]:
    snapshot = dataset.snapshot(version=version)
    files = snapshot.files()
    return {
        "kind": "pointers",
        "uri": dataset.uri,
        "table_id": dataset.table_id,
        "version": snapshot.version,
        "spec": dataset.spec.to_json(),
        "num_buckets": dataset.num_buckets,
        "window_length": dataset.grid.cadence,
        "digest": snapshot.digest,
        "num_examples": snapshot.num_examples,
        "num_windows": len(snapshot.windows),
        "num_files": files.num_rows,
        "num_bytes": pc.sum(files["size_bytes"]).as_py() or 0,
        "pins": {group: [pin.to_json() for pin in pins] for group, pins in snapshot.pins().items()},
        "windows": _windows(snapshot.windows, files.to_pylist(), window),
    }


def _windows(
    sealed: list[SealedWindow], files: list[dict[str, Any]], only: str | None
) -> list[dict[str, Any]]:
    sizes: Counter[str] = Counter()
    for file in files:
        sizes[file["segment"]] += file["size_bytes"]
    found = []
    for one in sealed:
        if only is not None and one.window.key != only:
            continue
        entry: dict[str, Any] = {
            "window": one.window.key,
            "start": format_us(one.window.start_us),
            "end": format_us(one.window.end_us),
            "digest": one.digest,
            "num_rows": one.num_rows,
            "num_bytes": sizes[one.window.segment],
            **{k: v for k, v in one.facts.items() if k.startswith("num_")},
        }
        if only is not None:
            entry["files"] = [f for f in files if f["segment"] == one.window.segment]
            if "pins" in one.facts:
                entry["pins"] = one.facts["pins"]
        found.append(entry)
    if only is not None and not found:
        raise WindowError(only, "not sealed here", "Leave --window out to see which are.")
    return found


def show(facts: dict[str, Any], console: Console, *, max_windows: int = 20) -> None:
    """Print what `describe` found."""
    head = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts.items():
        if name not in ("windows", "pins", "group", "spec", "metrics", "model", "environment"):
            head.add_row(name.replace("_", " "), _shown(name, value))
    console.print(head)
    declared = facts.get("group") or facts.get("spec")
    if declared:
        columns = declared.get("traits", declared.get("columns", []))
        named = ", ".join(f"{c['name']} ({c['type']})" for c in columns)
        console.print(f"{'traits' if 'traits' in declared else 'columns'}: {named or 'none'}")
    for name in ("metrics", "model", "environment"):
        if facts.get(name):
            table = Table(title=name, show_header=False, box=None, padding=(0, 2, 0, 0))
            for key, value in facts[name].items():
                table.add_row(str(key), _shown(key, value))
            console.print(table)
    windows = facts.get("windows", [])
    if windows:
        console.print(_window_table(windows[-max_windows:]))
        if len(windows) > max_windows:
            console.print(f"... and {len(windows) - max_windows:,} earlier windows (--all)")
    for window in windows:
        for file in window.get("files", []):
            console.print(f"  {file['path']}  {file['num_rows']:,} rows, {file['size_bytes']:,} B")


def _window_table(windows: list[dict[str, Any]]) -> Table:
    table = Table("window", header_style="bold")
    for name in ("rows", "users", "bytes", "bytes/row"):
        table.add_column(name, justify="right")
    table.add_column("")
    table.add_column("digest", overflow="fold", min_width=33)
    most = max(window["num_rows"] for window in windows) or 1
    for window in windows:
        rows = window["num_rows"]
        table.add_row(
            window["window"],
            f"{rows:,}",
            f"{window.get('num_users', 0):,}",
            f"{window['num_bytes']:,}",
            f"{window['num_bytes'] / rows:.1f}" if rows else "-",
            "█" * round(12 * rows / most),
            window["digest"].rpartition("-")[2],
        )
    return table


def _shown(name: str, value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int) and name.startswith("num_"):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)
