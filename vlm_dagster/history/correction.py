"""Replacing a sealed window: an explicit act that makes a new revision of it, with a reason.

Everything before the correction replays as it was: a pin names the digests of the windows it covers, so
it opens the old revision, or nothing. From the correction on, a snapshot holds the new one.

Where the window lies in a compacted segment, the same commit cuts this in up to three: what lies
before the window, the window, and what lies after it. The next compaction merges them again.
"""

from __future__ import annotations

import time

from deltalake import Transaction

from vlm_dagster.errors import WindowError
from vlm_dagster.history.rewrite import rewrite
from vlm_dagster.sealed.commit import Sealed, check_not_erased
from vlm_dagster.sealed.layout import Placed, StagedLayout, commit_layout, live_files
from vlm_dagster.sealed.log import SealedWindow, TableState, facts_id, lock_id
from vlm_dagster.sealed.segments import Segment
from vlm_dagster.sealed.staging import StagedWindow
from vlm_dagster.sealed.table import SealedTable
from vlm_dagster.windows import Window, format_us

__all__ = ["check_correctable", "commit_correction"]


def check_correctable(table: SealedTable, state: TableState, window: Window) -> SealedWindow:
    """The present revision of a window, or WindowError if it cannot be corrected."""
    sealed = state.sealed.get(window.index)
    if sealed is None:
        raise WindowError(
            window.key, f"not sealed in {table.uri}", "There is nothing to correct: seal it."
        )
    for removal in state.gone.removals:
        if removal.kind == "drop" and window.index <= table.spec.grid.parse(removal.through).index:
            raise WindowError(
                window.key,
                f"was dropped from {table.uri} ({removal.reason or 'no reason given'})",
                f"Windows after {removal.through} can be corrected.",
            )
    return sealed


def _check_still(table: SealedTable, staged: StagedWindow, state: TableState) -> None:
    """WindowError if the revision that was to be corrected is not the present one any more."""
    window, correction = staged.window, staged.correction
    assert correction is not None
    now = check_correctable(table, state, window)
    if (now.revision, now.digest) != (correction.revision, correction.digest):
        raise WindowError(
            window.key,
            f"revision {correction.revision} with digest {correction.digest} was to be corrected, "
            f"but somebody made it revision {now.revision} with {now.digest} meanwhile",
            "Look at that one first; then correct again if it is still wrong.",
        )


def _revision_of(table: SealedTable, staged: StagedWindow, state: TableState) -> list[Transaction]:
    """What gives the window its next revision, within the commit that replaces its files."""
    window, correction = staged.window, staged.correction
    assert correction is not None
    _check_still(table, staged, state)
    check_not_erased(table, staged, state)
    facts = {
        "key": window.key,
        "digest": staged.digest,
        **staged.facts,
        "reason": correction.reason,
        "name": correction.name,
        "replaces": correction.digest,
        "at": format_us(int(time.time() * 1e6)),
    }
    revision = correction.revision + 1
    return [
        Transaction(lock_id(window), revision),
        Transaction(facts_id(window, revision, facts), 1),
    ]


def commit_correction(table: SealedTable, staged: StagedWindow) -> Sealed:
    """Make a window that was staged as a correction the next revision of the one that is sealed.

    Raises:
        WindowError: it was corrected by somebody else meanwhile, or dropped.
        InvalidEventsError: it holds users who were erased.
        CorruptFileError: a file that has to be cut is not what the log says.
    """
    window, correction = staged.window, staged.correction
    assert correction is not None
    if staged.digest == correction.digest:
        _check_still(table, staged, table.state())
        version = table.versions.sealing(window)
        return Sealed.of(staged, version, reused=True, revision=correction.revision)
    while True:
        version = table.state().version
        added = [Placed(window.segment, file) for file in staged.files]
        holding = [one for one in table.segments(version) if one.first <= window.index <= one.last]
        for segment in holding:
            for windows in _beside(table, segment, window):
                added += rewrite(table, version, [segment], windows).added
        replaced = tuple(live_files(table, version, [segment.name for segment in holding]))
        found = commit_layout(
            table,
            StagedLayout("correction", window.key, tuple(added), replaced),
            lambda state: _revision_of(table, staged, state),
            {"vlm.reason": correction.reason},
        )
        if found is not None:
            return Sealed.of(staged, found, reused=False, revision=correction.revision + 1)


def _beside(table: SealedTable, segment: Segment, window: Window) -> list[list[Window]]:
    """The windows of a segment before one of them, and those after it; without empty runs."""
    grid = table.spec.grid
    before = [grid.at(index) for index in range(segment.first, window.index)]
    after = [grid.at(index) for index in range(window.index + 1, segment.last + 1)]
    return [windows for windows in (before, after) if windows]
