"""`vlm-dagster generate`: made-up events on disk."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from vlm_dagster.events import GeneratorConfig
from vlm_dagster.events.generate import generate, write

__all__ = ["write_events"]


def write_events(
    config: GeneratorConfig, directory: Path, console: Console, progress_console: Console
) -> None:
    """Write one Parquet file a day, with a progress bar, and say how many events there are."""
    started = time.monotonic()
    with Progress(
        TextColumn("generating"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=progress_console,
    ) as bar:
        task = bar.add_task("generating", total=generate(config).num_bytes)
        made = write(config, directory, progress=lambda done: bar.update(task, completed=done))
    seconds = time.monotonic() - started
    console.print(
        f"{made.num_events:,} events in {directory} "
        f"({made.num_events / max(seconds, 1e-9):,.0f} a second)"
    )
