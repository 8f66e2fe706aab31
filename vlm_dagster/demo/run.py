"""The demonstration itself: land the events, then materialize the code location's assets."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from vlm_dagster.demo.settings import DemoSettings, default_settings
from vlm_dagster.errors import SourceFormatError, VlmError
from vlm_dagster.events import EventSource, GeneratorConfig, Landing, land
from vlm_dagster.windows import Cadence, WindowGrid

if TYPE_CHECKING:
    import dagster as dg

__all__ = ["DemoError", "DemoRun", "dagster_home", "made_up", "prepare", "run_demo"]

_RANGE = ("dagster/asset_partition_range_start", "dagster/asset_partition_range_end")
_EVENTS_PER_BUCKET = 500_000
_MAX_BUCKETS = 16

# Ranking every held-out example among all items could take longer than everything else.
_COMMON: dict[str, Any] = {"eval_max_examples": 20_000, "epochs": 3}
# Nobody rates a film twice.
_TRAINING: dict[str, dict[str, Any]] = {"movielens": {"eval_exclude_seen": True}}


class DemoError(VlmError):
    """A step of the demonstration failed; what Dagster recorded says why."""

    def __init__(self, step: str, problem: str) -> None:
        super().__init__(f"{step} failed: {problem}")


@dataclass(frozen=True)
class DemoRun:
    """What was run, and how long its parts took, in seconds."""

    settings: DemoSettings
    home: Path
    seconds: Mapping[str, float]


def prepare(
    source: EventSource,
    described: Mapping[str, Any],
    home: Path,
    *,
    cadence: Cadence,
    console: Console,
    training: Mapping[str, Any],
) -> tuple[DemoSettings, Landing]:
    """Land the events and write the settings that the code location reads.

    Args:
        described: how to open the source again, as `DemoSettings.source` says.
        training: options of `TrainingConfig` over the format's own.
    """
    with Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
        console=console,
    ) as bar:
        task = bar.add_task("landing events", total=source.num_bytes or None)
        landing = land(
            source,
            home / "landing",
            WindowGrid(cadence),
            progress=lambda done: bar.update(task, completed=done),
        )
        size = source.num_bytes or 1
        bar.update(task, total=size, completed=size)
    windows = landing.windows
    if not windows:
        raise SourceFormatError(
            str(described.get("path", "the source")),
            "it holds no events",
            line=None,
            value=None,
            way_out="Give a file that does.",
        )
    buckets = -(-landing.num_events // _EVENTS_PER_BUCKET)
    settings = DemoSettings(
        source=dict(described),
        group=landing.group,
        label=landing.label,
        cadence=cadence,
        first_window=windows[0].key,
        end_window=landing.grid.at(windows[-1].index + 1).key,
        num_buckets=min(max(buckets, 2), _MAX_BUCKETS),
        training={**_COMMON, **_TRAINING.get(described["format"], {}), **training},
    )
    settings.save(home)
    return settings, landing


def made_up(config: GeneratorConfig) -> tuple[EventSource, dict[str, Any]]:
    """The embedded default: generated events, and how to open them again."""
    settings = default_settings(config)
    return settings.open_source(), settings.source


def dagster_home(home: Path) -> Path:
    """The Dagster instance of a home folder: runs and events stay there for the UI."""
    folder = home / "dagster"
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "dagster.yaml"
    if not config.exists():
        # No telemetry, and no sign-up form over the first page.
        config.write_text("telemetry:\n  enabled: false\nnux:\n  enabled: false\n", "utf-8")
    return folder


def run_demo(settings: DemoSettings, landing: Landing, home: Path, *, console: Console) -> DemoRun:
    """Materialize everything through Dagster, in this process, into the instance under `home`.

    Raises:
        DemoError: a step or a blocking check failed.
    """
    os.environ["DAGSTER_HOME"] = str(dagster_home(home))
    os.environ["VLM_HOME"] = str(home)
    import dagster as dg

    from vlm_dagster.definitions import demo_definitions

    windows = landing.windows
    seconds: dict[str, float] = {}
    with Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("windows"),
        TimeElapsedColumn(),
        console=console,
    ) as bar:
        tasks: dict[str, Any] = {}

        def on_window(stage: str) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=len(windows))
            bar.advance(tasks[stage])

        definitions = demo_definitions(settings, home, on_window=on_window)
        names = _asset_names(settings)
        with dg.DagsterInstance.get() as instance:
            span = dict(zip(_RANGE, (windows[0].key, windows[-1].key), strict=True))
            for step, keys, tags in (
                ("source", names[:1], {}),
                ("histories and pointers", names[1:3], span),
            ):
                seconds[step] = _materialize(definitions, instance, step, keys, tags)
    console.print("training and evaluation, each in a process of its own:")
    with dg.DagsterInstance.get() as instance:
        for name in names[3:]:
            seconds[name] = _materialize(definitions, instance, name, [name], {})
    return DemoRun(settings, home, seconds)


def _asset_names(settings: DemoSettings) -> list[str]:
    group = settings.group.name
    return ["raw_events", f"{group}_history", f"{group}_pointers", "ranker", "ranker_evaluation"]


def _materialize(
    definitions: dg.Definitions,
    instance: dg.DagsterInstance,
    step: str,
    names: Sequence[str],
    tags: Mapping[str, str],
) -> float:
    import dagster as dg

    started = time.monotonic()
    job = definitions.resolve_implicit_global_asset_job_def()
    result = job.execute_in_process(
        instance=instance,
        asset_selection=[dg.AssetKey(name) for name in names],
        tags=dict(tags),
        raise_on_error=False,
        run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
    )
    failed = [event for event in result.all_events if event.is_step_failure]
    if failed:
        data = failed[0].step_failure_data
        error = data.user_failure_data
        text = error.description if error is not None else None
        if not text and data.error is not None:
            text = (data.error.cause or data.error).message
        if text and "DagsterExecutionInterruptedError" in text:
            text = "it was interrupted. What was sealed stays: run the same command again to go on."
        raise DemoError(step, (text or "see the run in the UI").strip())
    for check in result.get_asset_check_evaluations():
        if not check.passed and check.severity == dg.AssetCheckSeverity.ERROR:
            raise DemoError(step, f"check {check.check_name} of {check.asset_key.to_user_string()}")
    if not result.success:
        raise DemoError(step, "see the run in the UI")
    return time.monotonic() - started
