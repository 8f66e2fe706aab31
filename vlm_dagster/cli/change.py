"""Commands that change what a table holds: explicit acts, each with a reason, each on record."""

from __future__ import annotations

from typing import Annotated

import typer

from vlm_dagster.cli.app import AsJson, Options, app, console, print_json

__all__ = ["correct", "drop", "erase"]

_PANEL = "Change, for a reason"
HistoryUri = Annotated[str, typer.Argument(help="A history table.")]


@app.command(rich_help_panel=_PANEL)
def erase(
    uris: Annotated[
        list[str], typer.Argument(help="History tables and pointer datasets, each in full.")
    ],
    users: Annotated[str, typer.Option(help="A text file of user ids, one a line; - for stdin.")],
    reason: Annotated[str, typer.Option(help="For the audit record; name no user in it.")],
    break_pins: Annotated[
        bool, typer.Option(help="Also if pins of windows that were corrected since break by it.")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="Only count.")] = False,
    as_json: AsJson = False,
    storage_option: Options = None,
) -> None:
    """Take users out of tables for good: out of every version, and off the disk.

    Cut short, the same command goes on where it stopped. Examples of erased users then fail a
    training, or are left out and counted, as it is told (gone="fail" or "drop").
    """
    from vlm_dagster.commands.change import erasure_facts, read_user_ids, show_erasure
    from vlm_dagster.commands.opening import open_any, parse_storage_options, table_of

    options = parse_storage_options(storage_option or [])
    tables = [table_of(open_any(uri, options), uri) for uri in uris]
    lines = read_user_ids(users)
    wanted = [
        (table, lines.typed(table.user_id)) for table in tables
    ]  # refused before any is changed
    reports = [
        table.erase(ids, reason=reason, break_pins=break_pins, dry_run=dry_run)
        for table, ids in wanted
    ]
    if as_json:
        print_json([erasure_facts(report) for report in reports])
    else:
        for report in reports:
            show_erasure(report, console())


@app.command(rich_help_panel=_PANEL)
def drop(
    uri: HistoryUri,
    before: Annotated[str, typer.Option(help="The key of the first window to keep.")],
    reason: Annotated[str, typer.Option(help="For the record.")] = "",
    delete: Annotated[bool, typer.Option(help="Do it; otherwise only say what would go.")] = False,
    as_json: AsJson = False,
    storage_option: Options = None,
) -> None:
    """Drop the oldest windows of a history by age; positions of all later events stay."""
    from vlm_dagster.commands.change import drop_facts, show_drop
    from vlm_dagster.commands.opening import history_of, open_any, parse_storage_options

    store = history_of(open_any(uri, parse_storage_options(storage_option or [])), uri)
    report = store.drop_before(before, reason=reason, dry_run=not delete)
    if as_json:
        print_json(drop_facts(report))
    else:
        show_drop(report, console())


@app.command(rich_help_panel=_PANEL)
def correct(
    uri: HistoryUri,
    window: Annotated[str, typer.Argument(help="Its key.")],
    files: Annotated[list[str], typer.Argument(help="Parquet files: all events of the window.")],
    reason: Annotated[str, typer.Option(help="Why it is replaced; for the record.")],
    name: Annotated[
        str | None, typer.Option(help="Of the revision; WINDOW@NUMBER if not given.")
    ] = None,
    as_json: AsJson = False,
    storage_option: Options = None,
) -> None:
    """Replace a sealed window by its next revision; old pins keep replaying the old one."""
    from vlm_dagster.commands.change import existing, sealed_facts, show_correction
    from vlm_dagster.commands.opening import history_of, open_any, parse_storage_options

    store = history_of(open_any(uri, parse_storage_options(storage_option or [])), uri)
    staged = store.stage_correction(window, existing(files), reason=reason, name=name)
    sealed = store.commit(staged)
    if as_json:
        print_json(sealed_facts(sealed))
    else:
        assert staged.correction is not None
        show_correction(sealed, staged.correction.digest, console())
