"""Erasing users for good: out of the newest version, out of the versions before it, off the disk.

    rows leave the newest version (history/erasure.py), oldest segment first
    all versions before that one are retired: their pins open the newest, proved by digest
    what only retired versions name is deleted (purge.py)

Killed anywhere, the next call with the same users goes on where this one stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from vlm_dagster.errors import SchemaError
from vlm_dagster.history.erasure import count_rows_of, erase_rows
from vlm_dagster.retention.purge import purge
from vlm_dagster.sealed.retired import retire
from vlm_dagster.sealed.table import SealedTable

__all__ = ["ErasureReport", "erase"]


@dataclass(frozen=True)
class ErasureReport:
    """What an erasure did, or with `dry_run` would do.

    Attributes:
        id: of its audit record, which `vlm-dagster inspect` shows; empty for a dry run.
        version: the first version without these users; no earlier one can be opened any more.
        num_users: asked for, each once.
        num_rows: that left, in this call and in earlier ones that were cut short.
        segments: names of those that were rewritten by this call.
        num_files_deleted, num_bytes_deleted: what is off the disk since.
    """

    uri: str
    id: str
    version: int
    num_users: int
    num_rows: int
    segments: tuple[str, ...]
    num_files_deleted: int
    num_bytes_deleted: int
    dry_run: bool


def erase(
    table: SealedTable,
    user_ids: Sequence[Any] | pa.Array,
    *,
    reason: str,
    dry_run: bool = False,
    progress: Callable[[str, int], None] | None = None,
) -> ErasureReport:
    """Erase users from a table; see `WindowedTable.erase`."""
    users = _distinct(table, user_ids)
    if not reason.strip():
        raise SchemaError("an erasure without a reason", "Say who asked for it, e.g. a ticket.")
    if dry_run:
        _, num_rows, segments = count_rows_of(table, users)
        version = table.state().version
        return ErasureReport(
            table.uri, "", version, len(users), num_rows, tuple(segments), 0, 0, True
        )
    rewritten: list[str] = []

    def note(segment: str, num_rows: int) -> None:
        rewritten.append(segment)
        if progress is not None:
            progress(segment, num_rows)

    version, removal = erase_rows(table, users, reason, note)
    retire(table, version, [], "erasure")
    # No grace: a file put in place again lately would hold what must not come back.
    purged = purge(table, grace_s=0)
    return ErasureReport(
        uri=table.uri,
        id=removal.id,
        version=version,
        num_users=len(users),
        num_rows=removal.num_rows,
        segments=tuple(rewritten),
        num_files_deleted=purged.num_files,
        num_bytes_deleted=purged.num_bytes,
        dry_run=False,
    )


def _distinct(table: SealedTable, user_ids: Sequence[Any] | pa.Array) -> pa.Array:
    """The users, sorted, each once, as the table has them."""
    kind = table.spec.columns.field("user_id").type
    way_out = f"Give ids as {table.uri} has them ({kind})."
    try:
        users = user_ids if isinstance(user_ids, pa.Array) else pa.array(user_ids)
        users = users.cast(kind) if len(users) else pa.array([], kind)
    except (
        pa.ArrowInvalid,
        pa.ArrowTypeError,
        pa.ArrowNotImplementedError,
        OverflowError,
    ) as error:
        raise SchemaError(f"these are no user ids of the table ({error})", way_out) from None
    if users.null_count:
        raise SchemaError("a user id is null", way_out)
    if not len(users):
        raise SchemaError("no user is named", "Name at least one.")
    return users.unique().sort()
