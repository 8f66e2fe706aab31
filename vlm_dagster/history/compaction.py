"""Compaction: many small segments become few large ones, and no event is rewritten often.

Segments are tiered by their number of windows: with a fan-out of 8, blocks of 8 windows become one
segment, then 8 of those one of 64, up to a limit. Blocks are counted from the table's first window,
so that every compactor wants the same merges. An event is rewritten once a tier at most: the
logarithm of the number of windows to the base of the fan-out. A table that was never compacted is
merged straight into its largest blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vlm_dagster.errors import SchemaError
from vlm_dagster.history.rewrite import rewrite
from vlm_dagster.sealed.layout import StagedLayout, commit_layout
from vlm_dagster.sealed.log import TableState
from vlm_dagster.sealed.segments import Segment, segment_name
from vlm_dagster.sealed.table import SealedTable
from vlm_dagster.windows import Window

__all__ = ["CompactionReport", "Merge", "compact", "plan_merges"]


@dataclass(frozen=True)
class Merge:
    """Adjacent segments that become one: that of the windows `[first, last]`."""

    first: Window
    last: Window
    segments: tuple[Segment, ...]
    num_events: int


@dataclass(frozen=True)
class CompactionReport:
    """What a compaction did, or with `dry_run` would do.

    Attributes:
        version: the newest version afterwards.
        merges: in the order in which they were made.
        num_lost: merges that another process made first.
        num_events_rewritten, num_bytes_written: of the merges that were made.
        segments_before, segments_after: segments with files.
    """

    version: int
    merges: tuple[Merge, ...]
    num_lost: int
    num_events_rewritten: int
    num_bytes_written: int
    segments_before: int
    segments_after: int
    dry_run: bool


def plan_merges(
    state: TableState, segments: list[Segment], *, fanout: int, max_windows: int
) -> list[Merge]:
    """The merges that a table wants now, oldest first; none overlaps another."""
    num_covered = len(state.covered)
    if state.start is None or not num_covered:
        return []
    grid, start = state.grid, state.start
    merges = []
    first = 0
    while first < num_covered:
        size = 1
        while size * fanout <= max_windows and first % (size * fanout) == 0:
            size *= fanout
        while first + size > num_covered:
            size //= fanout
        low, high = start + first, start + first + size - 1
        inside = [s for s in segments if s.last >= low and s.first <= high]
        # A larger segment than we want stays as it is (made with another fan-out).
        whole = all(low <= s.first and s.last <= high for s in inside)
        if whole and len(inside) > 1:
            indices = (index for s in inside for index in range(s.first, s.last + 1))
            num_events = sum(state.left(index).num_rows for index in indices)
            merges.append(Merge(grid.at(low), grid.at(high), tuple(inside), num_events))
        first += size
    return merges


def compact(
    table: SealedTable,
    *,
    fanout: int,
    max_windows: int,
    dry_run: bool,
    progress: Callable[[Merge], None] | None = None,
) -> CompactionReport:
    """Merge what there is to merge, a commit each; see `HistoryStore.compact`."""
    if isinstance(fanout, bool) or not isinstance(fanout, int) or fanout < 2:
        raise SchemaError(f"fanout={fanout!r}", "Use an integer of 2 or more.")
    if isinstance(max_windows, bool) or not isinstance(max_windows, int) or max_windows < 2:
        raise SchemaError(f"max_windows={max_windows!r}", "Use an integer of 2 or more.")
    state = table.state()
    segments = table.segments(state.version)
    merges = plan_merges(state, segments, fanout=fanout, max_windows=max_windows)
    if dry_run:
        saved = sum(len(merge.segments) - 1 for merge in merges)
        num_events = sum(merge.num_events for merge in merges)
        before = len(segments)
        return CompactionReport(
            state.version, tuple(merges), 0, num_events, 0, before, before - saved, True
        )
    made: list[Merge] = []
    num_lost = num_bytes = 0
    for merge in merges:
        version = table.state().version
        names = {segment.name for segment in table.segments(version)}
        if not names.issuperset(segment.name for segment in merge.segments):
            num_lost += 1
            continue
        windows = [state.grid.at(i) for i in range(merge.first.index, merge.last.index + 1)]
        written = rewrite(table, version, merge.segments, windows)
        where = segment_name(merge.first, merge.last)
        staged = StagedLayout("compaction", where, written.added, written.replaced)
        if commit_layout(table, staged) is None:
            num_lost += 1
            continue
        made.append(merge)
        num_bytes += written.num_bytes
        if progress is not None:
            progress(merge)
    after = table.state().version
    return CompactionReport(
        version=after,
        merges=tuple(made),
        num_lost=num_lost,
        num_events_rewritten=sum(merge.num_events for merge in made),
        num_bytes_written=num_bytes,
        segments_before=len(segments),
        segments_after=len(table.segments(after)),
        dry_run=False,
    )
