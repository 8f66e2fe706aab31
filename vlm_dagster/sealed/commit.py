"""The second half of sealing: one Delta transaction makes a staged window visible, at most once.

It carries the window's lock, a Delta application transaction. Of processes that race, the log lets
exactly one through; the others find the window sealed and compare digests.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction

from vlm_dagster.errors import (
    CorruptFileError,
    InvalidEventsError,
    StorageError,
    TableError,
    WindowSealedError,
)
from vlm_dagster.sealed.attempts import attempted
from vlm_dagster.sealed.log import START_ID, TableState, facts_id, lock_id
from vlm_dagster.sealed.staging import StagedWindow
from vlm_dagster.sealed.table import SealedTable
from vlm_dagster.windows import Window

__all__ = ["Sealed", "commit_window"]


@dataclass(frozen=True)
class Sealed:
    """The outcome of sealing.

    Attributes:
        version: the Delta version that sealed the window (an earlier one if it was reused).
        digest: the digest of the window's content.
        reused: the window was sealed already, with the same content; nothing was changed.
        revision: 1, unless the window was corrected.
        num_duplicates: rows dropped as duplicates under the declared policy.
        num_bytes: of the files written now; 0 if reused.
    """

    window: Window
    version: int
    digest: str
    num_events: int
    num_users: int
    num_duplicates: int
    num_bytes: int
    reused: bool
    revision: int = 1

    @classmethod
    def of(cls, staged: StagedWindow, version: int, *, reused: bool, revision: int = 1) -> Sealed:
        """The outcome for a window that was staged."""
        return cls(
            window=staged.window,
            version=version,
            digest=staged.digest,
            num_events=staged.num_rows,
            num_users=staged.num_users,
            num_duplicates=staged.num_duplicates,
            num_bytes=0 if reused else staged.num_bytes,
            reused=reused,
            revision=revision,
        )


def commit_window(table: SealedTable, staged: StagedWindow) -> Sealed:
    """Make a staged window visible: at most once, whoever else tries at the same time.

    Raises:
        WindowSealedError: it is sealed with other content.
        CorruptFileError: a staged file is gone.
        StorageError: the commit could not be written.
    """
    if staged.table_id != table.table_id:
        raise TableError(
            table.uri,
            f"the window was staged for table {staged.table_id}, but this is {table.table_id}",
            "Stage it again.",
        )

    def attempt() -> Sealed:
        with table.newest.lent() as handle:
            return _attempted(table, handle, staged)

    return attempted(table.uri, f"committing window {staged.window.key}", attempt)


def _attempted(table: SealedTable, handle: DeltaTable, staged: StagedWindow) -> Sealed:
    """One try. CommitFailedError if somebody else committed since the handle's version."""
    window = staged.window
    state = table.state_of(handle)
    if window.index in state.sealed:
        return _reuse(table, staged, state)
    table.check_window(window, state)
    if staged.already_sealed:
        raise TableError(
            table.uri,
            f"window {window.key} was sealed when it was staged, but is not any more",
            "Stage it again.",
        )
    _check_in_place(table, staged)
    check_not_erased(table, staged, state)
    base = int(handle.version())
    try:
        _commit_once(table, handle, staged, state)
    except CommitFailedError:
        raise
    except (DeltaError, OSError) as error:
        # With the commit in place, deltalake goes on to a checkpoint, which may fail by itself.
        version = None
        with contextlib.suppress(OSError):
            version = _version_of(table, staged, base)
        if version is None:
            raise StorageError(table.uri, f"committing window {window.key}", error) from error
    else:
        version = _version_of(table, staged, base)
    if version is None:
        raise AssertionError(f"{table.uri}: the commit of window {window.key} is not in the log")
    return Sealed.of(staged, version, reused=False)


def _facts_id(staged: StagedWindow) -> str:
    facts = {"key": staged.window.key, "digest": staged.digest, **staged.facts}
    return facts_id(staged.window, 1, facts)


def _commit_once(
    table: SealedTable, handle: DeltaTable, staged: StagedWindow, state: TableState
) -> None:
    window = staged.window
    locks = [Transaction(lock_id(window), 1), Transaction(_facts_id(staged), 1)]
    if state.start is None:
        locks.append(Transaction(START_ID, window.index))
    now_ms = int(time.time() * 1000)
    handle.create_write_transaction(
        [
            AddAction(
                file.path,
                file.size,
                {"segment": window.segment, "bucket": str(file.bucket)},
                now_ms,
                True,
                file.stats,
            )
            for file in staged.files
        ],
        "append",
        table.spec.delta_schema,
        ["segment", "bucket"],
        commit_properties=CommitProperties(
            app_transactions=locks,
            # Delta would put it on top of any commit that shares no lock with it, an erasure too.
            max_commit_retries=0,
            custom_metadata={
                "vlm.window": window.key,
                "vlm.digest": staged.digest,
                "vlm.num_rows": str(staged.num_rows),
            },
        ),
    )


def _check_in_place(table: SealedTable, staged: StagedWindow) -> None:
    # The Delta commit does not look whether its files exist.
    for file in staged.files:
        size = table.storage.size(file.path)
        if size != file.size:
            found = "is missing" if size is None else f"has {size} bytes, not {file.size}"
            raise CorruptFileError(
                table=table.uri,
                path=file.path,
                version=None,
                problem=f"{found}, so window {staged.window.key} was not committed",
            )


def _version_of(table: SealedTable, staged: StagedWindow, base: int) -> int | None:
    """The version after `base` that sealed a window as staged, if there is one."""
    wanted = {lock_id(staged.window), _facts_id(staged)}
    for version, transactions in table.log.commits_after(base):
        if wanted <= transactions.keys():
            return version
    return None


def _reuse(table: SealedTable, staged: StagedWindow, state: TableState) -> Sealed:
    found = state.sealed[staged.window.index]
    if not found.holds(staged.digest, state):
        raise WindowSealedError(
            table=table.uri,
            window=found.window.key,
            sealed=found.digest,
            offered=staged.digest,
        )
    version = table.versions.sealing(found.window)
    same = replace(staged, digest=found.digest)
    return Sealed.of(same, version, reused=True, revision=found.revision)


def check_not_erased(table: SealedTable, staged: StagedWindow, state: TableState) -> None:
    """InvalidEventsError if a window from before an erasure brings erased users back. Looked up
    at the commit, since they may have been erased after it was staged."""
    if not any(one.kind == "erasure" for one in state.gone.removals):
        return
    back: list[object] = []
    for file in staged.files:
        users = table.reader([file.path]).users.user_ids
        erased = table.gone_of(state.gone, users).erased_through >= staged.window.index
        back += users.filter(pa.array(erased)).to_pylist()
    if back:
        raise InvalidEventsError(
            f"{len(back)} users of window {staged.window.key} were erased from {table.uri}",
            row=None,
            column="user_id",
            value=back[0],
            way_out="Remove their rows at the source (the first is shown), then seal it again.",
        )
