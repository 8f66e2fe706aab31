"""The figures at the end of the demonstration: a table for a person, one JSON line for a program."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from vlm_dagster.demo.fat_rows import FatRows, estimate_fat_rows
from vlm_dagster.demo.run import DemoRun
from vlm_dagster.history import HistoryStore
from vlm_dagster.pointers import PointerDataset
from vlm_dagster.training.checkpoint import read_manifest

__all__ = ["DemoSummary", "show_summary", "summarize"]


@dataclass(frozen=True)
class DemoSummary:
    """All figures, JSON-able. Bytes are of files on disk; seconds are wall time."""

    events: int
    users: int
    windows: int
    examples: int
    history_version: int
    history_digest: str
    pointers_version: int
    history_bytes: int
    pointer_bytes: int
    stored_bytes: int
    fat_rows: dict[str, int]
    training: dict[str, Any]
    evaluation: dict[str, Any]
    checkpoint: str
    checkpoint_digest: str
    seconds: dict[str, float]
    home: str


def summarize(run: DemoRun) -> DemoSummary:
    """Read the figures from what was made, not from what was meant to be."""
    group = run.settings.group.name
    history = HistoryStore.open(run.home / "tables" / f"{group}_history").snapshot()
    pointers = PointerDataset.open(run.home / "tables" / f"{group}_pointers").snapshot()
    note = json.loads((run.home / "checkpoints" / "ranker" / "current.json").read_text("utf-8"))
    folder = Path(note["folder"])
    manifest = read_manifest(folder)
    evaluation = json.loads((folder / "evaluation.json").read_text("utf-8"))
    history_bytes = pc.sum(history.files()["size_bytes"]).as_py()
    pointer_bytes = pc.sum(pointers.files()["size_bytes"]).as_py()
    fat: FatRows = estimate_fat_rows(pointers, history)
    return DemoSummary(
        events=history.num_events,
        users=len(history.user_ids()),
        windows=len(history.windows),
        examples=pointers.num_examples,
        history_version=history.version,
        history_digest=history.digest,
        pointers_version=pointers.version,
        history_bytes=history_bytes,
        pointer_bytes=pointer_bytes,
        stored_bytes=history_bytes + pointer_bytes,
        fat_rows=asdict(fat),
        training=dict(manifest.metrics),
        evaluation=evaluation,
        checkpoint=str(folder),
        checkpoint_digest=manifest.digest,
        seconds={name: round(value, 1) for name, value in run.seconds.items()},
        home=str(run.home),
    )


def show_summary(found: DemoSummary, console: Console) -> None:
    """The table, then what to do next."""
    table = Table(show_header=False, box=None, padding=(0, 3, 0, 0))
    table.add_row("windows sealed", f"{found.windows:,}")
    table.add_row("events", f"{found.events:,} of {found.users:,} users")
    table.add_row("examples", f"{found.examples:,} pointers")
    table.add_row(
        "stored",
        f"{_size(found.stored_bytes)}: histories {_size(found.history_bytes)}, pointers "
        f"{_size(found.pointer_bytes)}",
    )
    fat = found.fat_rows
    table.add_row(
        "as fat rows",
        f"{_size(fat['by_time'])} by time with snappy ({_times(fat['by_time'], found)}), "
        f"{_size(fat['by_user'])} by user with zstd ({_times(fat['by_user'], found)})",
    )
    table.add_row(
        "",
        f"measured on {fat['num_sampled']:,} examples; {fat['num_copied_events']:,} copied events",
    )
    trained = found.training
    table.add_row("training", _training_line(trained))
    model, popular = found.evaluation["model"], found.evaluation["popularity"]
    table.add_row(
        "evaluation",
        f"HR@10 {model['hr@10']:.4f} (most popular items: {popular['hr@10']:.4f}), "
        f"NDCG@10 {model['ndcg@10']:.4f} ({popular['ndcg@10']:.4f})",
    )
    label = found.evaluation.get("label")
    if label and label.get("ne") is not None:
        table.add_row("", f"normalized entropy {label['ne']:.4f} (below 1 beats the base rate)")
    table.add_row(
        "versions",
        f"histories {found.history_version}, pointers {found.pointers_version}, checkpoint "
        f"{found.checkpoint_digest[:16]}",
    )
    table.add_row("seconds", ", ".join(f"{k} {v:.0f}" for k, v in found.seconds.items()))
    console.print()
    console.print(table)
    console.print("\nnext steps", style="bold")
    for what, command in (
        ("look at it in the Dagster UI", "make ui"),
        ("trace the model to its bytes", f"{_command()} lineage {_short(found.checkpoint)}"),
        ("prove that all is intact", f"{_command()} verify --deep {_short(found.checkpoint)}"),
        ("start over", "make clean"),
    ):
        console.print(f"  {what:<30} {command}")
    console.print()


def _training_line(metrics: dict[str, Any]) -> str:
    return (
        f"{metrics['num_steps']:,} steps, {metrics['num_examples']:,} examples, next-item loss "
        f"{metrics['next_item_loss']:.3f}, waited for data {metrics['data_wait_share']:.0%} of the time"
    )


def _times(fat_bytes: int, found: DemoSummary) -> str:
    return f"{fat_bytes / found.stored_bytes:.1f} times" if found.stored_bytes else "-"


def _size(num_bytes: int) -> str:
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"


def _command() -> str:
    """How this command line is called from here: it need not be on the PATH."""
    if shutil.which("vlm-dagster"):
        return "vlm-dagster"
    beside = Path(sys.executable).with_name("vlm-dagster")
    return _short(str(beside)) if beside.exists() else f"{_short(sys.executable)} -m vlm_dagster"


def _short(path: str) -> str:
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
