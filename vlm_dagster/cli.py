"""The command line. It reads arguments and prints; the work is in `vlm_dagster.commands`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from vlm_dagster.errors import VlmError

app = typer.Typer(
    name="vlm-dagster",
    help="Versioned late materialization for recommender training.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,  # locals may hold credentials
)

Uri = Annotated[str, typer.Argument(help="A history table, a pointer dataset or a checkpoint.")]
TableUri = Annotated[str, typer.Argument(help="A history table or a pointer dataset.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--storage-option", help="KEY=VALUE, as deltalake takes it; repeat for more."),
]
Version = Annotated[int | None, typer.Option(help="A Delta version; the newest if not given.")]


def _console(stderr: bool = False) -> Console:
    # Piped output keeps digests and paths in one piece.
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else 200)


@app.command()
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
        console=_console(),
    )


@app.command()
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
    write_events(config, directory, _console(), _console(stderr=True))


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="Where the web server listens.")] = 3000,
    host: Annotated[str, typer.Option(help="The address it listens on.")] = "127.0.0.1",
) -> None:
    """Open the Dagster UI on what the demo made: web server, schedules and automation."""
    from vlm_dagster.commands.ui import serve
    from vlm_dagster.demo.settings import home_folder

    serve(home_folder(), host, port)


@app.command()
def inspect(
    uri: Uri,
    version: Version = None,
    window: Annotated[str | None, typer.Option(help="Only this window, with its files.")] = None,
    all_windows: Annotated[bool, typer.Option("--all", help="Show every window.")] = False,
    as_json: AsJson = False,
    storage_option: Options = None,
) -> None:
    """Show what a table or a checkpoint holds: windows, watermark, bytes, digests, pins."""
    from vlm_dagster.commands.inspect import describe, show
    from vlm_dagster.commands.opening import open_any, parse_storage_options

    opened = open_any(uri, parse_storage_options(storage_option or []))
    facts = describe(opened, version, window)
    if as_json:
        _print_json(facts)
    else:
        show(facts, _console(), max_windows=sys.maxsize if all_windows else 20)


@app.command()
def lineage(
    uri: Uri,
    files: Annotated[bool, typer.Option(help="Name every file, too.")] = False,
    as_json: AsJson = False,
    storage_option: Options = None,
) -> None:
    """Trace a checkpoint or a pointer dataset back to the versions and bytes it was made from."""
    from vlm_dagster.commands.lineage import show_lineage, trace
    from vlm_dagster.commands.opening import open_any, parse_storage_options

    options = parse_storage_options(storage_option or [])
    found = trace(open_any(uri, options), files=files, storage_options=options)
    if as_json:
        _print_json(found)
    else:
        show_lineage(found, _console())


@app.command()
def verify(
    uri: Uri,
    version: Version = None,
    deep: Annotated[bool, typer.Option(help="Recompute digests from every row.")] = False,
    as_json: AsJson = False,
    storage_option: Options = None,
) -> None:
    """Check that all files are what was sealed; ends with 1 if any is not."""
    from vlm_dagster.commands.opening import open_any, parse_storage_options
    from vlm_dagster.commands.verify import verify_all

    options = parse_storage_options(storage_option or [])
    opened = open_any(uri, options)
    with Progress(
        TextColumn("verifying"),
        DownloadColumn(),
        TimeElapsedColumn(),
        console=_console(stderr=True),
    ) as bar:
        task = bar.add_task("verifying", total=None)
        found = verify_all(
            opened,
            version=version,
            deep=deep,
            storage_options=options,
            progress=lambda num_bytes: bar.advance(task, num_bytes),
        )
    if as_json:
        _print_json(
            {
                "ok": found.ok,
                "problems": list(found.problems),
                "tables": [
                    {"uri": r.uri, "version": r.version, "num_files": r.num_files,
                     "num_bytes": r.num_bytes, "num_rows": r.num_rows}
                    for r in found.reports
                ],
            }
        )  # fmt: skip
    else:
        console = _console()
        for report in found.reports:
            console.print(
                f"{report.uri} at version {report.version}: {report.num_windows:,} windows, "
                f"{report.num_files:,} files, {report.num_bytes:,} bytes checked"
            )
        for problem in found.problems:
            console.print(f"[red]{problem}[/red]")
        console.print("[green]intact[/green]" if found.ok else "[red]not intact[/red]")
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def compact(
    uri: Annotated[str, typer.Argument(help="A history table.")],
    fanout: Annotated[int, typer.Option(help="So many segments become one.")] = 8,
    max_windows: Annotated[int, typer.Option(help="The most windows of a segment.")] = 512,
    dry_run: Annotated[bool, typer.Option(help="Only say what would be merged.")] = False,
    as_json: AsJson = False,
    storage_option: Options = None,
) -> None:
    """Merge small segments of a history into larger ones: faster to read, the same data."""
    from vlm_dagster.commands.compact import as_facts, history_of, show_compaction
    from vlm_dagster.commands.opening import open_any, parse_storage_options

    store = history_of(open_any(uri, parse_storage_options(storage_option or [])), uri)
    report = store.compact(fanout=fanout, max_windows=max_windows, dry_run=dry_run)
    if as_json:
        _print_json(as_facts(report))
    else:
        show_compaction(report, _console())


@app.command()
def gc(
    uri: TableUri,
    delete: Annotated[
        bool, typer.Option(help="Do it; otherwise only say what would go and what holds the rest.")
    ] = False,
    keep_hours: Annotated[
        float, typer.Option(help="A version is kept so long after it was the newest.")
    ] = 24.0,
    move_pins: Annotated[
        bool, typer.Option(help="Let pins open the newest version where it holds the same content.")
    ] = False,
    verify: Annotated[
        bool, typer.Option(help="Check the newest version's files before pins are moved to it.")
    ] = False,
    forget: Annotated[
        list[str] | None,
        typer.Option(help="The address of a referrer that is gone for good; repeat, or use *."),
    ] = None,
    as_json: AsJson = False,
    storage_option: Options = None,
) -> None:
    """Let go of every version of a table that nothing refers to, and delete its files."""
    from vlm_dagster.commands.gc import as_facts, show_gc, table_of
    from vlm_dagster.commands.opening import open_any, parse_storage_options

    opened = table_of(open_any(uri, parse_storage_options(storage_option or [])), uri)
    report = opened.gc(
        dry_run=not delete,
        keep_hours=keep_hours,
        move_pins=move_pins,
        verify=verify,
        forget=forget or [],
    )
    if as_json:
        _print_json(as_facts(report))
    else:
        show_gc(report, _console())


@app.command()
def pin(
    uri: TableUri,
    name: Annotated[str, typer.Argument(help="Letters, digits, '.', '_' and '-'.")],
    version: Version = None,
    reason: Annotated[str, typer.Option(help="Why it is to be kept.")] = "",
    storage_option: Options = None,
) -> None:
    """Keep a version of a table under a name, whatever else refers to it."""
    from vlm_dagster.commands.gc import table_of
    from vlm_dagster.commands.opening import open_any, parse_storage_options

    opened = table_of(open_any(uri, parse_storage_options(storage_option or [])), uri)
    made = opened.pin(name, version, reason=reason)
    _console().print(f"{made.name}: version {made.version} of {opened.uri}, digest {made.digest}")


@app.command()
def unpin(
    uri: TableUri,
    name: Annotated[str, typer.Argument(help="The name of a pin.")],
    storage_option: Options = None,
) -> None:
    """Let a named pin go; its version goes with the next gc, unless something else holds it."""
    from vlm_dagster.commands.gc import table_of
    from vlm_dagster.commands.opening import open_any, parse_storage_options

    opened = table_of(open_any(uri, parse_storage_options(storage_option or [])), uri)
    gone = opened.unpin(name)
    _console().print(f"{gone.name} no longer keeps version {gone.version} of {opened.uri}")


@app.command()
def refer(
    uri: TableUri,
    referrer: Annotated[
        str, typer.Argument(help="A pointer dataset, a checkpoint, or a folder of checkpoints.")
    ],
    storage_option: Options = None,
) -> None:
    """Enter who refers to a table, so that gc keeps what it needs. Sealing and training do it
    themselves, where they may write to the table."""
    from vlm_dagster.commands.gc import referrer_of, table_of
    from vlm_dagster.commands.opening import open_any, parse_storage_options
    from vlm_dagster.errors import TableError
    from vlm_dagster.retention import register
    from vlm_dagster.storage import normalize_uri

    options = parse_storage_options(storage_option or [])
    opened = table_of(open_any(uri, options), uri)
    try:
        entry = referrer_of(open_any(referrer, options), referrer)
    except TableError:
        if "://" not in referrer and not Path(referrer).is_dir():
            raise
        entry = referrer_of(None, normalize_uri(referrer))
    done = register(opened.sealed_table, entry)
    _console().print(f"{entry} {'is' if done else 'was already'} entered in {opened.uri}")


@app.command()
def sweep(
    uri: Annotated[str, typer.Argument(help="A history table or a pointer dataset.")],
    older_than_hours: Annotated[
        float, typer.Option(help="Spare younger files: a sealer may be about to commit them.")
    ] = 24.0,
    delete: Annotated[bool, typer.Option(help="Delete them; otherwise only list them.")] = False,
    storage_option: Options = None,
) -> None:
    """List, or delete, files that killed processes left behind and no version names."""
    from vlm_dagster.commands.opening import CheckpointFolder, open_any, parse_storage_options
    from vlm_dagster.errors import TableError

    opened = open_any(uri, parse_storage_options(storage_option or []))
    if isinstance(opened, CheckpointFolder):
        raise TableError(uri, "this is a checkpoint", "Only tables are swept.")
    found = opened.sweep(older_than_s=older_than_hours * 3600, dry_run=not delete)
    console = _console()
    for info in found:
        console.print(f"{info.path}  {info.size:,} bytes")
    total = sum(info.size for info in found)
    done = "deleted" if delete else "would be deleted (--delete)"
    console.print(f"{len(found):,} files, {total:,} bytes {done}")


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def main() -> None:
    """Run the command line; our own errors print as one message, without a traceback."""
    try:
        app()
    except VlmError as error:
        _console(stderr=True).print(f"[red]error:[/red] {_escaped(str(error))}", soft_wrap=True)
        if os.environ.get("VLM_TRACEBACK"):
            raise
        sys.exit(1)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
