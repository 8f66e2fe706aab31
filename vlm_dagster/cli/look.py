"""Commands that only look: what a table holds, where it came from, whether it is intact."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.progress import DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from vlm_dagster.cli.app import AsJson, Options, Uri, Version, app, console, print_json

_PANEL = "Look"


@app.command(rich_help_panel=_PANEL)
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
        print_json(facts)
    else:
        show(facts, console(), max_windows=sys.maxsize if all_windows else 20)


@app.command(rich_help_panel=_PANEL)
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
        print_json(found)
    else:
        show_lineage(found, console())


@app.command(rich_help_panel=_PANEL)
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
        console=console(stderr=True),
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
        print_json(
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
        out = console()
        for report in found.reports:
            out.print(
                f"{report.uri} at version {report.version}: {report.num_windows:,} windows, "
                f"{report.num_files:,} files, {report.num_bytes:,} bytes checked"
            )
        for problem in found.problems:
            out.print(f"[red]{problem}[/red]")
        out.print("[green]intact[/green]" if found.ok else "[red]not intact[/red]")
    if not found.ok:
        raise typer.Exit(1)
