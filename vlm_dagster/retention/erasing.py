"""Erasing users for good: out of the newest version, out of the versions before it, off the disk.

    rows leave the newest version (history/erasure.py), oldest segment first
    all versions before that one are retired: their pins open the newest, proved by digest
    what only retired versions name is deleted (purge.py)

Killed anywhere, the next call with the same users goes on where this one stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from vlm_dagster.errors import CorruptFileError, PinError, SchemaError, TableError
from vlm_dagster.history.erasure import count_rows_of, erase_rows
from vlm_dagster.retention.collect import opens_at
from vlm_dagster.retention.proof import dropped_since, holds_content
from vlm_dagster.retention.purge import purge
from vlm_dagster.retention.references import Hold, find_references
from vlm_dagster.sealed.reader import SegmentReader
from vlm_dagster.sealed.retired import retire
from vlm_dagster.sealed.table import SealedTable

if TYPE_CHECKING:
    from vlm_dagster.sealed.owner import WindowedTable

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
        lost: pins of windows that were corrected or dropped since, which cannot be opened
            afterwards, or lack these.
    """

    uri: str
    id: str
    version: int
    num_users: int
    num_rows: int
    segments: tuple[str, ...]
    num_files_deleted: int
    num_bytes_deleted: int
    lost: tuple[Hold, ...]
    dry_run: bool


def erase(
    owner: WindowedTable,
    user_ids: Sequence[Any] | pa.Array,
    *,
    reason: str,
    break_pins: bool = False,
    dry_run: bool = False,
    progress: Callable[[str, int], None] | None = None,
) -> ErasureReport:
    """Erase users from a table; see `WindowedTable.erase`."""
    table = owner.sealed_table
    users = _distinct(table, user_ids)
    if not reason.strip():
        raise SchemaError("an erasure without a reason", "Say who asked for it, e.g. a ticket.")
    lost = _lost(owner)
    if dry_run:
        _, num_rows, segments = count_rows_of(table, users)
        return ErasureReport(
            uri=table.uri,
            id="",
            version=table.state().version,
            num_users=len(users),
            num_rows=num_rows,
            segments=tuple(segments),
            num_files_deleted=0,
            num_bytes_deleted=0,
            lost=lost,
            dry_run=True,
        )
    if lost and not break_pins:
        more = f" and {len(lost) - 1:,} more" if len(lost) > 1 else ""
        raise PinError(
            table.uri,
            pinned=f"{lost[0]} at version {lost[0].version}{more}",
            found="windows that were corrected or dropped since",
            way_out="Only the version that is pinned has that content, and an erasure retires every "
            "earlier version: build these pointers anew, unpin, or erase with break_pins=True "
            "(--break-pins), after which such pins cannot be opened, or lack what was dropped. "
            "Nothing was changed.",
        )
    rewritten: list[str] = []

    def note(segment: str, num_rows: int) -> None:
        rewritten.append(segment)
        if progress is not None:
            progress(segment, num_rows)

    version, removal = erase_rows(table, users, reason, note)
    retire(table, version, [], "erasure")
    purged = purge(table, at_once=lambda path: _may_hold(table, path, users))
    return ErasureReport(
        uri=table.uri,
        id=removal.id,
        version=version,
        num_users=len(users),
        num_rows=removal.num_rows,
        segments=tuple(rewritten),
        num_files_deleted=purged.num_files,
        num_bytes_deleted=purged.num_bytes,
        lost=lost,
        dry_run=False,
    )


def _lost(owner: WindowedTable) -> tuple[Hold, ...]:
    """What pins content that only an earlier version has: windows corrected or dropped since."""
    table = owner.sealed_table
    newest = table.state()

    def breaks(hold: Hold) -> bool:
        version: int | None = hold.version
        if hold.version in newest.retired:  # it moved, or opens one from before a correction
            version = opens_at(owner, newest, hold)
        if version is None or version == newest.version:
            return False
        return not holds_content(newest, hold.pin) or dropped_since(
            newest, hold.pin, table.state(version)
        )

    return tuple(hold for hold in find_references(owner).holds if breaks(hold))


def _may_hold(table: SealedTable, path: str, users: pa.Array) -> bool:
    """Whether a file may hold rows of some users: then nothing spares it. Any other one that was put in
    place again lately may be about to be committed."""
    try:
        found = SegmentReader(table.storage, path).users.user_ids
    except (CorruptFileError, TableError):
        return True
    return bool(pc.any(pc.is_in(found, value_set=users)).as_py())


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
