"""Committing what an asset staged, and telling what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import dagster as dg

from vlm_dagster.io_managers.handles import Sealing
from vlm_dagster.sealed import Sealed, StagedWindow
from vlm_dagster.storage import redact
from vlm_dagster.windows import format_us

__all__ = ["SealableTable", "commit", "sealed_facts", "summary_facts"]


class SealableTable(Protocol):
    """A history store or a pointer dataset."""

    @property
    def uri(self) -> str: ...
    @property
    def table_id(self) -> str: ...
    def commit(self, staged: StagedWindow) -> Sealed: ...


def commit(table: SealableTable, sealing: Sealing, keys: Sequence[str] | None) -> None:
    """Commit each staged window, oldest first, and note the outcome on `sealing`.

    Each window is its own write-once commit: of processes that race, one writes and the others find
    the same content, or fail naming both digests.

    Args:
        keys: the partitions of the run; staged windows must be among them.
    """
    strangers = [
        s.window.key for s in sealing.staged if keys is not None and s.window.key not in keys
    ]
    if strangers:
        raise dg.Failure(
            f"window {strangers[0]!r} was staged in a run of partition {', '.join(keys or ())}: "
            f"stage the windows of `context.partition_keys`, and no others.",
            allow_retries=False,
        )
    sealing.sealed.clear()
    for staged in sealing.staged:
        sealing.sealed.append(table.commit(staged))


def sealed_facts(table: SealableTable, sealed: Sealed, watermark_us: int | None) -> dict[str, Any]:
    """The metadata of one sealed window."""
    return {
        "dagster/uri": redact(table.uri),
        "dagster/row_count": sealed.num_events,
        "version": sealed.version,
        "digest": sealed.digest,
        "revision": sealed.revision,
        "num_users": sealed.num_users,
        "num_duplicates_dropped": sealed.num_duplicates,
        "num_bytes_written": sealed.num_bytes,
        "reused": sealed.reused,
        "watermark": "(nothing sealed)" if watermark_us is None else format_us(watermark_us),
        "table_id": table.table_id,
    }


def summary_facts(table: SealableTable, sealing: Sealing) -> dict[str, Any]:
    """The metadata of several windows together."""
    sealed = sealing.sealed
    mark = sealing.watermark_us
    return {
        "dagster/uri": redact(table.uri),
        "version": max(s.version for s in sealed),
        "num_windows": len(sealed),
        "num_windows_reused": sum(s.reused for s in sealed),
        "num_rows_of_run": sum(s.num_events for s in sealed),
        "num_bytes_written": sum(s.num_bytes for s in sealed),
        "watermark": "(nothing sealed)" if mark is None else format_us(mark),
        "table_id": table.table_id,
    }
