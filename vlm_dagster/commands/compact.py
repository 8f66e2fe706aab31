"""`vlm-dagster compact`: merge small segments of a history table, and say what that did."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from vlm_dagster.history.compaction import CompactionReport, Merge

__all__ = ["as_facts", "show_compaction"]


def as_facts(report: CompactionReport) -> dict[str, Any]:
    """The report as JSON."""
    return {
        "dry_run": report.dry_run,
        "version": report.version,
        "merges": [_merge(merge) for merge in report.merges],
        "num_lost": report.num_lost,
        "num_events_rewritten": report.num_events_rewritten,
        "num_bytes_written": report.num_bytes_written,
        "segments_before": report.segments_before,
        "segments_after": report.segments_after,
    }


def _merge(merge: Merge) -> dict[str, Any]:
    return {
        "first": merge.first.key,
        "last": merge.last.key,
        "num_segments": len(merge.segments),
        "num_events": merge.num_events,
    }


def show_compaction(report: CompactionReport, console: Console) -> None:
    """Print the report."""
    if not report.merges and not report.num_lost:
        console.print(f"nothing to compact: {report.segments_before:,} segments")
        return
    table = Table("windows", header_style="bold")
    table.add_column("segments", justify="right")
    table.add_column("events", justify="right")
    for merge in report.merges:
        table.add_row(
            f"{merge.first.key} to {merge.last.key}",
            f"{len(merge.segments):,}",
            f"{merge.num_events:,}",
        )
    console.print(table)
    done = "would become (leave --dry-run out)" if report.dry_run else "became"
    console.print(
        f"{report.segments_before:,} segments {done} {report.segments_after:,}; "
        f"{report.num_events_rewritten:,} events rewritten"
    )
    if report.num_lost:
        console.print(f"{report.num_lost:,} merges were made by another process first")
    if not report.dry_run:
        console.print(
            f"version {report.version} holds the same data; earlier versions keep their files "
            "until they are collected"
        )
