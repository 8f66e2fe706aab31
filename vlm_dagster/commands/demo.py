"""`vlm-dagster demo`: arguments to settings, then the run, then its figures."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast, get_args

from rich.console import Console

from vlm_dagster.demo.run import made_up, prepare, run_demo
from vlm_dagster.demo.settings import DemoSettings
from vlm_dagster.errors import SchemaError
from vlm_dagster.events import GeneratorConfig, open_source
from vlm_dagster.windows import Cadence

__all__ = ["run"]


def run(
    home: Path,
    *,
    events: str | None,
    format: str | None,  # noqa: A002
    windows: str,
    mapping: list[str],
    time_unit: str | None,
    on_cut_line: str,
    users: int,
    days: int,
    seed: int,
    max_seconds: float,
    console: Console,
) -> None:
    """Run the demonstration into `home`; the last line printed is one JSON object.

    Raises:
        VlmError: an argument does not fit, the input is bad, or a step failed.
    """
    if windows not in get_args(Cadence):
        raise SchemaError(
            f"--windows {windows!r} is unknown", f"Use {', '.join(get_args(Cadence))}."
        )
    if (events is None) != (format is None):
        raise SchemaError(
            "EVENTS and FORMAT belong together",
            "E.g. make demo EVENTS=ratings.csv FORMAT=movielens; or neither, for made-up events.",
        )
    described: dict[str, Any]
    if events is None:
        config = GeneratorConfig(num_users=users, num_days=days, seed=seed)
        source, described = made_up(config)
        console.print(f"made-up events of {users:,} users over {days} days")
    else:
        described = {"format": format, "path": str(Path(events).absolute())}
        pairs = dict(_pair(text) for text in mapping)
        options = {"mapping": pairs or None, "time_unit": time_unit}
        described |= {name: value for name, value in options.items() if value is not None}
        if on_cut_line != "refuse":
            described["on_cut_line"] = on_cut_line
        source = open_source(**described)
        console.print(f"{format} events from {events}")
    _refuse_other_data(home, described, windows)
    settings, landing = prepare(
        source,
        described,
        home,
        cadence=cast(Cadence, windows),
        console=console,
        training={"max_seconds": max_seconds},
    )
    done = run_demo(settings, landing, home, console=console)

    from vlm_dagster.demo.summary import show_summary, summarize

    found = summarize(done)
    show_summary(found, console)
    sys.stdout.write(json.dumps(asdict(found)) + "\n")


def _pair(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not equals or not ours or not theirs:
        raise SchemaError(f"--map {text!r} is not OURS=THEIRS", "E.g. --map user_id=uid.")
    return ours, theirs


def _refuse_other_data(home: Path, described: dict[str, Any], windows: str) -> None:
    """Sealed windows never change, so one home holds one data set."""
    if not (home / "demo.json").exists():
        return
    before = DemoSettings.load(home)
    if before.source != described or before.cadence != windows:
        raise SchemaError(
            f"{home} holds a demonstration on other data ({before.source.get('path', 'made-up')})",
            "Remove it with `make clean`, or choose another folder, e.g. VLM_HOME=.vlm-2.",
        )
