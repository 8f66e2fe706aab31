"""The versions of a table and what holds them, as `vlm-dagster inspect` shows it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape

from vlm_dagster.commands.gc import kept_facts, versions_table, warnings_of
from vlm_dagster.errors import VlmError
from vlm_dagster.history import HistoryStore
from vlm_dagster.pointers import PointerDataset
from vlm_dagster.retention.collect import find_holding
from vlm_dagster.retention.protection import missing_protection
from vlm_dagster.sealed.lifetimes import Lifetimes
from vlm_dagster.windows import format_us

__all__ = ["describe_versions", "show_versions"]

_NEWEST = 5
_MOST_ROWS = 20


def describe_versions(owner: HistoryStore | PointerDataset) -> dict[str, Any]:
    """The newest versions and the held ones, newest first, JSON-able; a problem, if it is not known."""
    table = owner.sealed_table
    try:
        lifetimes = Lifetimes(table)
        holding = find_holding(owner, lifetimes)
        warnings = warnings_of(holding, missing_protection(table), owner.uri)
    except VlmError as error:
        return {"problem": str(error)}
    rows = {kept.version: kept_facts(kept) for kept in holding.kept}
    for version in range(max(holding.version - _NEWEST + 1, 0), holding.version):
        commit = lifetimes.commits.get(version)
        if version not in rows and commit is not None:
            at = format_us(int(commit.at_s * 1e6))
            rows[version] = {
                "version": version, "at": at, "what": commit.what, "num_bytes": None,
                "own_bytes": None, "holds": [],
            }  # fmt: skip
    retired = holding.retired
    for version, row in rows.items():
        row["retired"] = version in retired
    return {
        "newest": holding.version,
        "rows": [rows[version] for version in sorted(rows, reverse=True)],
        "num_retired": holding.num_retired,
        "retired_by": retired.by,
        "retired_at": retired.at,
        "num_unheld": holding.version + 1 - holding.num_retired - len(holding.kept),
        "warnings": warnings,
    }


def show_versions(facts: dict[str, Any], console: Console) -> None:
    """Print what `describe_versions` found."""
    if "problem" in facts:
        console.print(f"[yellow]versions: {escape(facts['problem'])}[/yellow]")
        return
    rows = facts["rows"]
    console.print(versions_table(rows[:_MOST_ROWS], facts["newest"]))
    if len(rows) > _MOST_ROWS:
        console.print(f"... and {len(rows) - _MOST_ROWS:,} earlier versions that are held (--json)")
    parts = []
    if facts["num_retired"]:
        parts.append(
            f"{facts['num_retired']:,} retired (last by {facts['retired_by']}, "
            f"{facts['retired_at'][:19]})"
        )
    if facts["num_unheld"]:
        parts.append(f"{facts['num_unheld']:,} that nothing holds (`vlm-dagster gc`)")
    if parts:
        console.print(f"other versions: {'; '.join(parts)}")
    for text in facts["warnings"]:
        console.print(f"[yellow]{escape(text)}[/yellow]")
