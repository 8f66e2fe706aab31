"""Replacing a sealed window: an explicit act that makes a new revision of it, with a reason.

Everything before the correction replays as it was: a pin names the digests of the windows it covers, so
it opens the old revision, or nothing. From the correction on, a snapshot holds the new one.

Where the window lies in a compacted segment, the same commit cuts this in up to three: what lies
before the window, the window, and what lies after it. The next compaction merges them again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

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


@dataclass
class _Revising:
    """Gives a window its next revision within the commit that replaces its files."""

    table: SealedTable
    staged: StagedWindow
    before: SealedWindow
    reason: str
    name: str | None
    revision: int = field(init=False)

    def __post_init__(self) -> None:
        self.revision = self.before.revision + 1

    def __call__(self, state: TableState) -> Sequence[Transaction]:
        window = self.staged.window
        now = check_correctable(self.table, state, window)
        if (now.revision, now.digest) != (self.before.revision, self.before.digest):
            raise WindowError(
                window.key,
                f"revision {self.before.revision} with digest {self.before.digest} was to be "
                f"corrected, but somebody made it revision {now.revision} with {now.digest} "
                "meanwhile",
                "Look at that one first; then correct again if it is still wrong.",
            )
        check_not_erased(self.table, self.staged, state)
        facts = {
            "key": window.key,
            "digest": self.staged.digest,
            **self.staged.facts,
            "reason": self.reason,
            "name": self.name or f"{window.key}@{self.revision}",
            "replaces": self.before.digest,
            "at": format_us(int(time.time() * 1e6)),
        }
        return [
            Transaction(lock_id(window), self.revision),
            Transaction(facts_id(window, self.revision, facts), 1),
        ]


def commit_correction(
    table: SealedTable,
    staged: StagedWindow,
    before: SealedWindow,
    reason: str,
    name: str | None,
) -> Sealed:
    """Make a staged window the next revision of the one that is sealed.

    Raises:
        WindowError: it was corrected by somebody else meanwhile, or dropped.
        InvalidEventsError: it holds users who were erased.
        CorruptFileError: a file that has to be cut is not what the log says.
    """
    window = staged.window
    if staged.digest == before.digest:
        version = table.versions.sealing(window)
        return Sealed.of(staged, version, reused=True, revision=before.revision)
    revising = _Revising(table, staged, before, reason, name)
    while True:
        version = table.state().version
        added = [Placed(window.segment, file) for file in staged.files]
        holding = [one for one in table.segments(version) if one.first <= window.index <= one.last]
        for segment in holding:
            for windows in _beside(table, segment, window):
                added += rewrite(table, version, [segment], windows).added
        replaced = tuple(live_files(table, version, [segment.name for segment in holding]))
        layout = StagedLayout("correction", window.key, tuple(added), replaced)
        found = commit_layout(table, layout, revising, {"vlm.reason": reason})
        if found is not None:
            return Sealed.of(staged, found, reused=False, revision=revising.revision)


def _beside(table: SealedTable, segment: Segment, window: Window) -> list[list[Window]]:
    """The windows of a segment before one of them, and those after it; without empty runs."""
    grid = table.spec.grid
    before = [grid.at(index) for index in range(segment.first, window.index)]
    after = [grid.at(index) for index in range(window.index + 1, segment.last + 1)]
    return [windows for windows in (before, after) if windows]
