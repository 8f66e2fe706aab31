"""`vlm-dagster gc`, `pin`, `unpin` and `refer`: what holds the versions of a table, and letting go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlm_dagster.commands.opening import CheckpointFolder, Opened
from vlm_dagster.errors import TableError
from vlm_dagster.history import HistoryStore
from vlm_dagster.pointers import PointerDataset
from vlm_dagster.retention import GcReport, Hold, Holding, KeptVersion, Referrer
from vlm_dagster.windows import format_us

__all__ = [
    "as_facts",
    "kept_facts",
    "referrer_of",
    "show_gc",
    "versions_table",
    "warnings_of",
]

_MOST_HOLDERS = 3
_BAR = 16


def referrer_of(opened: Opened | None, uri: str) -> Referrer:
    """The entry of a pointer dataset or of a checkpoint; of a folder of checkpoints, if nothing is
    open there."""
    if isinstance(opened, HistoryStore):
        raise TableError(
            uri, "this is a history table", "Pointer datasets and checkpoints refer to tables."
        )
    if isinstance(opened, PointerDataset):
        return Referrer.pointers(opened.uri, opened.table_id)
    if isinstance(opened, CheckpointFolder):
        return Referrer.checkpoint(opened.path, opened.manifest.pins)
    return Referrer.checkpoint(uri)


def as_facts(report: GcReport) -> dict[str, Any]:
    """The report as JSON."""
    holding = report.holding
    return {
        "uri": report.uri,
        "dry_run": report.dry_run,
        "version": holding.version,
        "kept": [kept_facts(one) for one in holding.kept],
        "recent_since": holding.since,
        "recent_bytes": holding.recent_bytes,
        "num_retired_before": holding.num_retired,
        "num_retired": holding.num_to_retire,
        "moved": [_hold(hold) for hold in holding.moved],
        "lost": [_hold(hold) for hold in holding.lost],
        "vanished": [
            {"uri": one.referrer.uri, "kind": one.referrer.kind, "problem": one.problem,
             "holds_all": one.holds_all}
            for one in holding.vanished
        ],
        "forgotten": [one.referrer.uri for one in holding.references.forgotten],
        "unprotected": report.unprotected,
        "num_files": report.purged.num_files,
        "num_bytes": report.purged.num_bytes,
        "num_spared": report.purged.num_spared,
        "files": [info.path for info in report.purged.files],
    }  # fmt: skip


def kept_facts(kept: KeptVersion) -> dict[str, Any]:
    """A kept version as JSON."""
    return {
        "version": kept.version,
        "at": None if kept.at_s is None else format_us(int(kept.at_s * 1e6)),
        "what": kept.what,
        "num_bytes": kept.num_bytes,
        "own_bytes": kept.own_bytes,
        "holds": [_hold(hold) for hold in kept.holds],
    }


def _hold(hold: Hold) -> dict[str, Any]:
    return {
        "version": hold.version,
        "kind": hold.kind,
        "holder": hold.holder,
        "what": hold.what,
        "digest": hold.pin.digest,
        "as": str(hold),
    }


def versions_table(rows: Sequence[dict[str, Any]], newest: int) -> Table:
    """Versions, what committed them, their bytes with a bar, and what holds them.

    Args:
        rows: as `kept_facts` makes them; bytes may be None.
    """
    table = Table("version", header_style="bold")
    table.add_column("committed")
    table.add_column("by")
    table.add_column("bytes", justify="right")
    table.add_column("only here", justify="right")
    table.add_column("█ only here ░ shared", min_width=_BAR)
    table.add_column("held by", overflow="fold")
    most = max((row["num_bytes"] or 0 for row in rows), default=0)
    for row in rows:
        size, own = row["num_bytes"], row["own_bytes"]
        whole = round(_BAR * (size or 0) / max(most, 1))
        only = min(whole, round(_BAR * (own or 0) / max(most, 1)))
        table.add_row(
            f"{row['version']}",
            (row["at"] or "-")[:19],
            escape(row["what"]),
            "-" if size is None else f"{size:,}",
            "-" if own is None else f"{own:,}",
            "█" * only + "░" * (whole - only),
            escape(_held_by(row, newest)),
        )
    return table


def _held_by(row: dict[str, Any], newest: int) -> str:
    lines = ["the newest"] if row["version"] == newest else []
    lines += dict.fromkeys(hold["as"] for hold in row["holds"])
    more = len(lines) - _MOST_HOLDERS
    return "\n".join(lines if more <= 1 else [*lines[:_MOST_HOLDERS], f"... and {more:,} more"])


def warnings_of(holding: Holding, unprotected: dict[str, str | None], uri: str) -> list[str]:
    """What a person should look at, a sentence or two each."""
    found = [
        f"{one.referrer} cannot be opened: {one.problem.rstrip('.')}. "
        + (
            "It may refer to anything, so nothing is let go until it is found again"
            if one.holds_all
            else "What it was entered with is held until it is found again"
        )
        + f", entered from where it lies now (`vlm-dagster refer {uri} ADDRESS`), or forgotten "
        f"(`vlm-dagster gc {uri} --forget {one.referrer.uri}`)."
        for one in holding.vanished
    ]
    found += [
        f"{hold} refers to version {hold.version}, which cannot be opened: its log was cleaned away, "
        "or its content was corrected or dropped after nothing held it. No version that is kept has "
        "that content."
        for hold in holding.lost
    ]
    if unprotected:
        found.append(
            "Another writer switched off what protects pinned versions: "
            + ", ".join(f"{name} is {value!r}" for name, value in sorted(unprotected.items()))
            + f". `vlm-dagster gc {uri} --delete` sets these properties again."
        )
    return found


def show_gc(report: GcReport, console: Console) -> None:
    """Print the report: what is held by what, then what went."""
    holding = report.holding
    console.print(versions_table([kept_facts(one) for one in holding.kept], holding.version))
    if holding.since < holding.version:
        console.print(
            f"versions {holding.since} to {holding.version} are kept for being recent: "
            f"{holding.recent_bytes:,} bytes that no other has (--keep-hours)"
        )
    if holding.moved:
        verb = "would open" if report.dry_run else "open"
        console.print(
            f"{len(holding.moved):,} references {verb} version {holding.version} from now on: it "
            "holds what they name, proved by digest"
        )
    for text in warnings_of(holding, report.unprotected, report.uri):
        console.print(f"[yellow]{escape(text)}[/yellow]")
    if report.purged.num_spared:
        console.print(
            f"{report.purged.num_spared:,} files that were put in place again lately are spared"
        )
    retired = f"{holding.num_to_retire:,} versions"
    files = f"{report.purged.num_bytes:,} bytes in {report.purged.num_files:,} files"
    if report.dry_run:
        console.print(f"would retire {retired} and free {files}; run with --delete")
    else:
        console.print(f"retired {retired}, freed {files}")
