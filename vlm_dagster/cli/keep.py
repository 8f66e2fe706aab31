"""Commands that keep a table small and safe: no data changes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_dagster.cli.app import AsJson, Options, TableUri, Version, app, console, print_json

_PANEL = "Keep small and safe"


@app.command(rich_help_panel=_PANEL)
def compact(
    uri: Annotated[str, typer.Argument(help="A history table.")],
    fanout: Annotated[int, typer.Option(help="So many segments become one.")] = 8,
    max_windows: Annotated[int, typer.Option(help="The most windows of a segment.")] = 512,
    dry_run: Annotated[bool, typer.Option(help="Only say what would be merged.")] = False,
    as_json: AsJson = False,
    storage_option: Options = None,
) -> None:
    """Merge small segments of a history into larger ones: faster to read, the same data."""
    from vlm_dagster.commands.compact import as_facts, show_compaction
    from vlm_dagster.commands.opening import history_of, open_any, parse_storage_options

    store = history_of(open_any(uri, parse_storage_options(storage_option or [])), uri)
    report = store.compact(fanout=fanout, max_windows=max_windows, dry_run=dry_run)
    if as_json:
        print_json(as_facts(report))
    else:
        show_compaction(report, console())


@app.command(rich_help_panel=_PANEL)
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
    let_dropped_go: Annotated[
        bool, typer.Option(help="Let pins go that hold windows which were dropped by age since.")
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
    from vlm_dagster.commands.gc import as_facts, show_gc
    from vlm_dagster.commands.opening import open_any, parse_storage_options, table_of

    opened = table_of(open_any(uri, parse_storage_options(storage_option or [])), uri)
    report = opened.gc(
        dry_run=not delete,
        keep_hours=keep_hours,
        move_pins=move_pins,
        let_dropped_go=let_dropped_go,
        verify=verify,
        forget=forget or [],
    )
    if as_json:
        print_json(as_facts(report))
    else:
        show_gc(report, console())


@app.command(rich_help_panel=_PANEL)
def pin(
    uri: TableUri,
    name: Annotated[str, typer.Argument(help="Letters, digits, '.', '_' and '-'.")],
    version: Version = None,
    reason: Annotated[str, typer.Option(help="Why it is to be kept.")] = "",
    storage_option: Options = None,
) -> None:
    """Keep a version of a table under a name, whatever else refers to it."""
    from vlm_dagster.commands.opening import open_any, parse_storage_options, table_of

    opened = table_of(open_any(uri, parse_storage_options(storage_option or [])), uri)
    made = opened.pin(name, version, reason=reason)
    console().print(f"{made.name}: version {made.version} of {opened.uri}, digest {made.digest}")


@app.command(rich_help_panel=_PANEL)
def unpin(
    uri: TableUri,
    name: Annotated[str, typer.Argument(help="The name of a pin.")],
    storage_option: Options = None,
) -> None:
    """Let a named pin go; its version goes with the next gc, unless something else holds it."""
    from vlm_dagster.commands.opening import open_any, parse_storage_options, table_of

    opened = table_of(open_any(uri, parse_storage_options(storage_option or [])), uri)
    gone = opened.unpin(name)
    console().print(f"{gone.name} no longer keeps version {gone.version} of {opened.uri}")


@app.command(rich_help_panel=_PANEL)
def refer(
    uri: TableUri,
    referrer: Annotated[
        str, typer.Argument(help="A pointer dataset, a checkpoint, or a folder of checkpoints.")
    ],
    storage_option: Options = None,
) -> None:
    """Enter who refers to a table, so that gc keeps what it needs.

    Sealing and training do it themselves, where they may write to the table.
    """
    from vlm_dagster.commands.gc import referrer_of
    from vlm_dagster.commands.opening import open_any, parse_storage_options, table_of
    from vlm_dagster.errors import TableError
    from vlm_dagster.retention import register
    from vlm_dagster.storage import normalize_uri

    options = parse_storage_options(storage_option or [])
    opened = table_of(open_any(uri, options), uri)
    try:
        found: Any = open_any(referrer, options)
    except TableError:
        if "://" not in referrer and not Path(referrer).is_dir():
            raise
        found = None  # a folder of checkpoints, which is none itself
    entry = referrer_of(found, normalize_uri(referrer))
    done = register(opened.sealed_table, entry)
    console().print(f"{entry} {'is' if done else 'was already'} entered in {opened.uri}")


@app.command(rich_help_panel=_PANEL)
def sweep(
    uri: Annotated[str, typer.Argument(help="A history table or a pointer dataset.")],
    older_than_hours: Annotated[
        float, typer.Option(help="Spare younger files: a sealer may be about to commit them.")
    ] = 24.0,
    delete: Annotated[bool, typer.Option(help="Delete them; otherwise only list them.")] = False,
    storage_option: Options = None,
) -> None:
    """List, or delete, files that killed processes left behind and no version names."""
    from vlm_dagster.commands.opening import open_any, parse_storage_options, table_of

    opened = table_of(open_any(uri, parse_storage_options(storage_option or [])), uri)
    found = opened.sweep(older_than_s=older_than_hours * 3600, dry_run=not delete)
    out = console()
    for info in found:
        out.print(f"{info.path}  {info.size:,} bytes")
    total = sum(info.size for info in found)
    done = "deleted" if delete else "would be deleted (--delete)"
    out.print(f"{len(found):,} files, {total:,} bytes {done}")
