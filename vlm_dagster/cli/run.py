"""Commands that start something: the demo, its events, its web server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlm_dagster.cli.app import app, console

_PANEL = "Start"


@app.command(rich_help_panel=_PANEL)
def demo(
    events: Annotated[
        str | None, typer.Option(help="A file or folder of events; made-up events if not given.")
    ] = None,
    format: Annotated[  # noqa: A002
        str | None, typer.Option(help="movielens, globo, taobao, parquet or csv.")
    ] = None,
    windows: Annotated[str, typer.Option(help="hourly, daily or weekly.")] = "daily",
    map_column: Annotated[
        list[str] | None,
        typer.Option("--map", help="OURS=THEIRS, a column's name in parquet or csv; repeat."),
    ] = None,
    time_unit: Annotated[str | None, typer.Option(help="Of numbers as times: s, ms or us.")] = None,
    on_cut_line: Annotated[
        str, typer.Option(help="What to do with a last line cut off in the middle: refuse or drop.")
    ] = "refuse",
    users: Annotated[int, typer.Option(help="Of made-up events.")] = 2_000,
    days: Annotated[int, typer.Option(help="Of made-up events.")] = 30,
    seed: Annotated[int, typer.Option(help="Of made-up events.")] = 0,
    max_seconds: Annotated[float, typer.Option(help="Train at most so long.")] = 60.0,
) -> None:
    """Run the main job, end to end, through Dagster: events to a trained model, into VLM_HOME."""
    from vlm_dagster.commands.demo import run
    from vlm_dagster.demo.settings import home_folder

    run(
        home_folder(),
        events=events,
        format=format,
        windows=windows,
        mapping=map_column or [],
        time_unit=time_unit,
        on_cut_line=on_cut_line,
        users=users,
        days=days,
        seed=seed,
        max_seconds=max_seconds,
        console=console(),
    )


@app.command(rich_help_panel=_PANEL)
def generate(
    directory: Annotated[Path, typer.Argument(help="A folder to make.")],
    users: Annotated[int, typer.Option(help="How many users.")] = 2_000,
    items: Annotated[int, typer.Option(help="How many items.")] = 5_000,
    days: Annotated[int, typer.Option(help="How many days of availability.")] = 30,
    start: Annotated[str, typer.Option(help="The first day, in UTC.")] = "2025-01-01",
    per_day: Annotated[float, typer.Option(help="Events a day of an average user.")] = 6.0,
    longest: Annotated[int, typer.Option(help="Events of the heaviest user, about.")] = 4_000,
    seed: Annotated[int, typer.Option(help="Equal seeds make equal files.")] = 0,
) -> None:
    """Write made-up events that look like people: one Parquet file a day."""
    from vlm_dagster.commands.generate import write_events
    from vlm_dagster.events import GeneratorConfig

    config = GeneratorConfig(
        num_users=users,
        num_items=items,
        num_days=days,
        start=start,
        events_per_user_day=per_day,
        longest_history=longest,
        seed=seed,
    )
    write_events(config, directory, console(), console(stderr=True))


@app.command(rich_help_panel=_PANEL)
def ui(
    port: Annotated[int, typer.Option(help="Where the web server listens.")] = 3000,
    host: Annotated[str, typer.Option(help="The address it listens on.")] = "127.0.0.1",
) -> None:
    """Open the Dagster UI on what the demo made: web server, schedules and automation."""
    from vlm_dagster.commands.ui import serve
    from vlm_dagster.demo.settings import home_folder

    serve(home_folder(), host, port)
