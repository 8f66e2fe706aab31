"""Replacing files by others with the same rows: one Delta transaction that changes no data.

Delta does not check removed files for conflicts: two rewrites from stale handles would both succeed,
and the rows stand twice. So every rewrite carries the application transaction `vlm.layout`, whose
version counts up: of two that race, the log lets one through, and the other looks again whether its
files are still there. Sealing does not carry it: adding windows and rewriting old ones do not
touch each other.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, RemoveAction

from vlm_dagster.errors import CorruptFileError, StorageError
from vlm_dagster.sealed.log import LAYOUT_ID
from vlm_dagster.sealed.table import SealedTable
from vlm_dagster.sealed.writer import StagedFile

__all__ = ["LiveFile", "StagedLayout", "commit_layout"]

_MAX_TRIES = 50


@dataclass(frozen=True)
class LiveFile:
    """A file that a version names."""

    path: str
    size: int
    segment: str
    bucket: int


@dataclass(frozen=True)
class StagedLayout:
    """Files in place but not committed, and those that they stand for.

    Attributes:
        segment: the partition value of the new files.
        what: a word for errors and for the log, e.g. "compaction".
    """

    segment: str
    files: tuple[StagedFile, ...]
    replaced: tuple[LiveFile, ...]
    what: str


def commit_layout(
    table: SealedTable, staged: StagedLayout, metadata: Mapping[str, str] | None = None
) -> int | None:
    """Make a rewrite visible, in one step.

    Returns:
        The version, or None if another rewrite replaced some of the files first: nothing was changed
        then.

    Raises:
        CorruptFileError: a staged file is gone.
        StorageError: the commit could not be written.
    """
    problem: BaseException | None = None
    for attempt in range(_MAX_TRIES):
        handle = table.handle()
        version = int(handle.version())
        live = set(table.files(version)["path"].to_pylist())
        if not live.issuperset(file.path for file in staged.replaced):
            return None
        _check_in_place(table, staged)
        number = table.log.transactions(version).get(LAYOUT_ID, 0) + 1
        try:
            _commit_once(table, handle, staged, number, dict(metadata or {}))
        except CommitFailedError as error:
            problem = error
            time.sleep(min(0.002 * 2**attempt, 0.25))
            continue
        except (DeltaError, OSError) as error:
            raise StorageError(
                table.uri, f"committing the {staged.what} of {staged.segment}", error
            ) from error
        for found, transactions in table.log.commits_after(version):
            if transactions.get(LAYOUT_ID) == number:
                return found
        raise AssertionError(f"{table.uri}: the commit of layout {number} is not in the log")
    raise StorageError(
        table.uri,
        f"committing the {staged.what} of {staged.segment} ({_MAX_TRIES} tries, others kept "
        "winning)",
        problem or RuntimeError("no try was made"),
    )


def _commit_once(
    table: SealedTable,
    handle: DeltaTable,
    staged: StagedLayout,
    number: int,
    metadata: dict[str, str],
) -> None:
    now_ms = int(time.time() * 1000)
    kept = {(file.path, staged.segment) for file in staged.files}
    adds = [
        AddAction(
            file.path,
            file.size,
            {"segment": staged.segment, "bucket": str(file.bucket)},
            now_ms,
            False,
            file.stats,
        )
        for file in staged.files
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
            app_transactions=[Transaction(LAYOUT_ID, number)],
            custom_metadata={f"vlm.{staged.what}": staged.segment, **metadata},
        ),
    )


def _check_in_place(table: SealedTable, staged: StagedLayout) -> None:
    for file in staged.files:
        size = table.storage.size(file.path)
        if size != file.size:
            found = "is missing" if size is None else f"has {size} bytes, not {file.size}"
            raise CorruptFileError(
                table=table.uri,
                path=file.path,
                version=None,
                problem=f"{found}, so the {staged.what} of {staged.segment} was not committed",
            )
