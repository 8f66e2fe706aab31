"""What all commands share: the application, arguments that many take, and how they print."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from vlm_dagster.errors import VlmError

__all__ = [
    "AsJson",
    "Options",
    "TableUri",
    "Uri",
    "Version",
    "app",
    "console",
    "main",
    "print_json",
]

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


def console(stderr: bool = False) -> Console:
    """A console for people, or for pipes."""
    # Piped output keeps digests and paths in one piece.
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else 200)


def print_json(value: Any) -> None:
    """To standard output."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def main() -> None:
    """Run the command line; our own errors print as one message, without a traceback."""
    try:
        app()
    except VlmError as error:
        console(stderr=True).print(f"[red]error:[/red] {_escaped(str(error))}", soft_wrap=True)
        if os.environ.get("VLM_TRACEBACK"):
            raise
        sys.exit(1)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
