"""`vlm-dagster inspect`: what a table or a checkpoint holds, for a person or as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from vlm_dagster.commands.opening import CheckpointFolder, Opened
from vlm_dagster.commands.versions import describe_versions, show_versions
from vlm_dagster.errors import WindowError
from vlm_dagster.history import HistoryStore
from vlm_dagster.history.inventory import inventory
from vlm_dagster.pointers import PointerDataset
from vlm_dagster.sealed import SealedWindow
from vlm_dagster.windows import format_us

__all__ = ["describe", "show"]

_MOST_SEGMENTS = 20
_OWN_TABLES = frozenset(
    {"windows", "pins", "group", "spec", "metrics", "model", "environment", "versions"}
    | {"segments", "bands", "columns", "removals"}
)


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
        facts = _describe_history(opened, version, window)
    else:
        facts = _describe_pointers(opened, version, window)
    if version is None and window is None:
        facts["versions"] = describe_versions(opened)
    return facts


def _describe_history(
    store: HistoryStore, version: int | None, window: str | None
) -> dict[str, Any]:
    snapshot = store.snapshot(version)
    past = snapshot.windows_past_watermark
    files = snapshot.files(past_watermark=True)
    segments, bands, columns, foreign = inventory(snapshot)
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
        "num_events_gone": snapshot.num_events_gone,
        "num_files": files.num_rows,
        "num_bytes": pc.sum(files["size_bytes"]).as_py() or 0,
        "num_files_without_index": foreign,
        "segments": [asdict(one) for one in segments],
        "bands": [asdict(band) for band in bands],
        "columns": [asdict(column) for column in columns],
        "removals": [asdict(one) for one in snapshot.removals],
        "windows": _windows(
            [*snapshot.windows, *past], files.to_pylist(), window, snapshot.num_gone
        ),
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
        "removals": [asdict(one) for one in snapshot.removals],
        "windows": _windows(snapshot.windows, files.to_pylist(), window, snapshot.num_gone),
    }


def _windows(
    sealed: list[SealedWindow],
    files: list[dict[str, Any]],
    only: str | None,
    num_gone: Callable[[SealedWindow], int],
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
            "num_rows_gone": num_gone(one),
            "revision": one.revision,
            **{k: one.facts[k] for k in ("name", "reason", "replaces", "at") if k in one.facts},
            # None: it lies in a compacted segment together with others, or it is empty.
            "num_bytes": sizes.get(one.window.segment),
            **{k: v for k, v in one.facts.items() if k.startswith("num_")},
        }
        if only is not None:
            entry["files"] = [f for f in files if _holds(f["segment"], one.window.segment)]
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
        if name not in _OWN_TABLES:
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
    if "segments" in facts:
        _show_files(facts, console)
    if facts.get("removals"):
        console.print(_removal_table(facts["removals"]))
    if "versions" in facts:
        show_versions(facts["versions"], console)
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
    changed = any(one["revision"] > 1 or one["num_rows_gone"] for one in windows)
    if changed:
        table.add_column("gone", justify="right")
        table.add_column("revision")
    table.add_column("digest", overflow="fold", min_width=33)
    most = max(window["num_rows"] for window in windows) or 1
    for window in windows:
        rows, size = window["num_rows"], window["num_bytes"]
        since = []
        if changed:
            why = f" ({window['reason']})" if "reason" in window else ""
            since = [f"{window['num_rows_gone']:,}", f"{window['revision']}{why}"]
        table.add_row(
            window["window"],
            f"{rows:,}",
            f"{window.get('num_users', 0):,}",
            "-" if size is None else f"{size:,}",
            f"{size / rows:.1f}" if rows and size else "-",
            "█" * round(12 * rows / most),
            *since,
            window["digest"].rpartition("-")[2],
        )
    return table


def _removal_table(removals: list[dict[str, Any]]) -> Table:
    table = Table("removal", "when", "through", header_style="bold")
    for name in ("users", "rows"):
        table.add_column(name, justify="right")
    table.add_column("reason", overflow="fold")
    table.add_column("id")
    for one in removals:
        table.add_row(
            one["kind"] if one["done"] else f"{one['kind']}, not complete: call it again",
            one["at"],
            one["through"] or "-",
            f"{one['num_users']:,}",
            f"{one['num_rows']:,}",
            one["reason"] or "-",
            one["id"],
        )
    return table


def _holds(segment: str, window: str) -> bool:
    # Windows of a grid have keys of one length, so their order is that of the text.
    first, dots, last = segment.partition("..")
    return first <= window <= (last if dots else first)


def _show_files(facts: dict[str, Any], console: Console) -> None:
    """Segments, bands and columns of a history, each with a bar."""
    if not facts["segments"]:
        return
    segments = facts["segments"][-_MOST_SEGMENTS:]
    table = _bar_table("segment", "windows", "files", "events", "bytes", "bytes/event")
    most = max(one["num_rows"] for one in segments) or 1
    for one in segments:
        table.add_row(
            one["name"],
            f"{one['num_windows']:,}",
            f"{one['num_files']:,}",
            f"{one['num_rows']:,}",
            f"{one['num_bytes']:,}",
            f"{one['num_bytes'] / max(one['num_rows'], 1):.1f}",
            _bar(one["num_rows"], most),
        )
    console.print(table)
    if len(facts["segments"]) > len(segments):
        console.print(f"... and {len(facts['segments']) - len(segments):,} earlier segments")
    table = _bar_table("band (newest of a user in a file)", "events", "row groups")
    low = 0
    most = max(band["num_rows"] for band in facts["bands"]) if facts["bands"] else 1
    for band in facts["bands"]:
        edge = band["edge"]
        name = f"{low:,} and beyond" if edge is None else f"{low:,} to {edge - 1:,}"
        low = edge or 0
        rows = band["num_rows"]
        table.add_row(name, f"{rows:,}", f"{band['num_row_groups']:,}", _bar(rows, most))
    console.print(table)
    table = _bar_table("column", "bytes", "bytes/event", "compressed to")
    most = max(column["stored"] for column in facts["columns"]) or 1
    for column in facts["columns"]:
        stored, plain = column["stored"], column["uncompressed"]
        table.add_row(
            column["name"] or "(footers and indices)",
            f"{stored:,}",
            f"{stored / max(facts['num_events'], 1):.2f}",
            f"{stored / plain:.0%}" if plain else "-",
            _bar(stored, most),
        )
    console.print(table)


def _bar_table(first: str, *others: str) -> Table:
    table = Table(first, header_style="bold")
    for name in others:
        table.add_column(name, justify="right")
    table.add_column("")
    return table


def _bar(value: int, most: int) -> str:
    return "█" * round(20 * value / max(most, 1))


def _shown(name: str, value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int) and name.startswith("num_"):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)
