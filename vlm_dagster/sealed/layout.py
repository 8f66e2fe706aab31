"""Replacing files by others: one Delta transaction that changes no data in Delta's sense.

Delta does not check removed files for conflicts: two rewrites from stale handles would both succeed,
and the rows stand twice. So every rewrite carries the application transaction `vlm.layout`, whose
version counts up: of two that race, the log lets one through, and the other looks again whether its
files are still there. Sealing does not carry it: adding windows and rewriting old ones do not
touch each other.

Compaction keeps all rows. Erasing and dropping remove some, and the same commit says so in the ledger
(gone.py); a correction carries the new revision of its window. Delta is not told that data changed:
the tables are append-only to everybody else, and stay so (docs/decisions/0015).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.transaction import AddAction, RemoveAction

from vlm_dagster.errors import CorruptFileError, TableError
from vlm_dagster.sealed.attempts import attempted
from vlm_dagster.sealed.log import LAYOUT_ID, TableState
from vlm_dagster.sealed.segments import find_segments
from vlm_dagster.sealed.table import SealedTable
from vlm_dagster.sealed.writer import StagedFile

__all__ = ["LiveFile", "Placed", "StagedLayout", "commit_layout", "live_files"]


@dataclass(frozen=True)
class LiveFile:
    """A file that a version names."""

    path: str
    size: int
    segment: str
    bucket: int


@dataclass(frozen=True)
class Placed:
    """A file in place but not committed, and the segment that it belongs to."""

    segment: str
    file: StagedFile


@dataclass(frozen=True)
class StagedLayout:
    """Files in place but not committed, and those that they stand for.

    Attributes:
        what: a word for errors and for the log, e.g. "compaction".
        where: of which windows, for the same.
    """

    what: str
    where: str
    added: tuple[Placed, ...]
    replaced: tuple[LiveFile, ...]


def live_files(table: SealedTable, version: int, segments: Sequence[str]) -> list[LiveFile]:
    """The files of some segments at a version."""
    names = set(segments)
    return [
        LiveFile(row["path"], row["size_bytes"], row["segment"], row["bucket"])
        for row in table.files(version).to_pylist()
        if row["segment"] in names
    ]


def commit_layout(
    table: SealedTable,
    staged: StagedLayout,
    also: Callable[[TableState], Sequence[Transaction]] = lambda state: (),
    metadata: Mapping[str, str] | None = None,
) -> int | None:
    """Make a rewrite visible, in one step.

    Args:
        also: from the state that the commit builds on, further transactions to carry.

    Returns:
        The version, or None if another rewrite replaced some of the files first: nothing was changed
        then.

    Raises:
        CorruptFileError: a staged file is gone.
        StorageError: the commit could not be written.
    """

    def attempt() -> int | None:
        with table.newest.lent() as handle:
            return _attempted(table, handle, staged, also, metadata or {})

    return attempted(table.uri, f"committing the {staged.what} of {staged.where}", attempt)


def _attempted(
    table: SealedTable,
    handle: DeltaTable,
    staged: StagedLayout,
    also: Callable[[TableState], Sequence[Transaction]],
    metadata: Mapping[str, str],
) -> int | None:
    """One try. CommitFailedError if somebody else committed since the handle's version."""
    version = int(handle.version())
    actions = pa.table(handle.get_add_actions(flatten=True))
    live = dict(zip(*(actions[n].to_pylist() for n in ("path", "partition.segment")), strict=True))
    if not live.keys() >= {file.path for file in staged.replaced}:
        return None
    for file in staged.replaced:
        live.pop(file.path, None)
    try:
        # Windows without rows have no files to tell by: two rewrites may still want other segments.
        names = {*live.values(), *(one.segment for one in staged.added)}
        find_segments(table.uri, names, table.state_of(handle))
    except TableError:
        return None
    _check_in_place(table, staged)
    number = table.log.transactions(version).get(LAYOUT_ID, 0) + 1
    more = also(table.state_of(handle))
    _commit_once(table, handle, staged, number, more, dict(metadata))
    for found, transactions in table.log.commits_after(version):
        if transactions.get(LAYOUT_ID) == number:
            return found
    raise AssertionError(f"{table.uri}: the commit of layout {number} is not in the log")


def _commit_once(
    table: SealedTable,
    handle: DeltaTable,
    staged: StagedLayout,
    number: int,
    also: Sequence[Transaction],
    metadata: dict[str, str],
) -> None:
    now_ms = int(time.time() * 1000)
    kept = {(one.file.path, one.segment) for one in staged.added}
    adds = [
        AddAction(
            one.file.path,
            one.file.size,
            {"segment": one.segment, "bucket": str(one.file.bucket)},
            now_ms,
            False,
            one.file.stats,
        )
        for one in staged.added
    ]
    removes = [
        RemoveAction(
            path=file.path,
            data_change=False,
            deletion_timestamp=now_ms,
            size=file.size,
            partition_values={"segment": file.segment, "bucket": str(file.bucket)},
        )
        for file in staged.replaced
        if (file.path, file.segment) not in kept
    ]
    handle.create_write_transaction(
        [*adds, *removes],
        "append",
        table.spec.delta_schema,
        ["segment", "bucket"],
        commit_properties=CommitProperties(
            app_transactions=[Transaction(LAYOUT_ID, number), *also],
            max_commit_retries=0,  # what was decided was decided at this very version
            custom_metadata={f"vlm.{staged.what}": staged.where, **metadata},
        ),
    )


def _check_in_place(table: SealedTable, staged: StagedLayout) -> None:
    for one in staged.added:
        size = table.storage.size(one.file.path)
        if size != one.file.size:
            found = "is missing" if size is None else f"has {size} bytes, not {one.file.size}"
            raise CorruptFileError(
                table=table.uri,
                path=one.file.path,
                version=None,
                problem=f"{found}, so the {staged.what} of {staged.where} was not committed",
            )
