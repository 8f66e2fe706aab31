"""Segments: the immutable files of one window, or of a contiguous run of windows after compaction."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from vlm_dagster.errors import TableError
from vlm_dagster.sealed.log import SealedWindow, TableState
from vlm_dagster.windows import Window

__all__ = ["Segment", "find_segments", "segment_name"]


@dataclass(frozen=True, order=True)
class Segment:
    """A run of windows, `[first, last]` by index. `name` is the partition value of its files."""

    first: int
    last: int
    name: str

    @property
    def num_windows(self) -> int:
        return self.last - self.first + 1

    def windows(self, state: TableState) -> list[SealedWindow]:
        """Its windows as sealed, oldest first."""
        return [state.sealed[index] for index in range(self.first, self.last + 1)]


def segment_name(first: Window, last: Window) -> str:
    """The partition value of the files of a run of windows."""
    return first.segment if first == last else f"{first.segment}..{last.segment}"


def find_segments(uri: str, names: Iterable[str], state: TableState) -> list[Segment]:
    """What the partition values at a version mean, oldest first.

    Raises:
        TableError: a value names no sealed windows, or two of them share a window.
    """
    index_of = {sealed.window.segment: index for index, sealed in state.sealed.items()}
    found: list[Segment] = []
    for name in names:
        first, dots, last = name.partition("..")
        low, high = index_of.get(first), index_of.get(last if dots else first)
        whole = (
            low is not None
            and high is not None
            and low <= high
            and all(index in state.sealed for index in range(low, high + 1))
        )
        if not whole or low is None or high is None:
            raise _changed(uri, state, f"there are files of {name}, which was never sealed")
        found.append(Segment(low, high, name))
    found.sort()
    for one, next_one in pairwise(found):
        if next_one.first <= one.last:
            raise _changed(uri, state, f"segments {one.name} and {next_one.name} share a window")
    return found


def _changed(uri: str, state: TableState, what: str) -> TableError:
    return TableError(
        uri,
        f"at version {state.version} {what}: another writer changed the table",
        "Pin a version before that.",
    )
