"""Filling arenas: decode some row groups of a file, copy their ranges into place, go on.

Nothing is held of a file but the piece being decoded, which is still in the processor's cache when it
is copied from. Pieces of small files are copied together, as each copying costs something. Files are
independent of each other, so threads share them out; where storage has to fetch, the bytes of the next
files are on their way meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vlm_dagster.cores import num_cores
from vlm_dagster.history.buffers import ArenaBuffers
from vlm_dagster.sealed.gathering import Placement, gather, width_of
from vlm_dagster.sealed.reader import Piece, SegmentReader

__all__ = ["FilePart", "Visit", "fill"]

I64 = npt.NDArray[np.int64]

# A task is so many pieces of a file: enough that opening it again costs nothing beside, few enough
# that threads end at about the same time.
_PIECES_AT_ONCE = 16
# Smaller pieces wait for others until there are so many rows.
_ROWS_TOGETHER = 32_768
# Some 10 ms of decoding, a hundred times what it takes to start threads.
_MANY_EVENTS = 1_000_000
# Fetched ahead of decoding.
_AHEAD_BYTES = 64 << 20


@dataclass(frozen=True)
class FilePart:
    """Row ranges of a file, and where they go.

    Attributes:
        rows, counts, targets: [R] where each range begins in the file, how many rows it has (at least
            1), and where it begins in the arena.
    """

    reader: SegmentReader
    rows: I64
    counts: I64
    targets: I64


Ranges = tuple[I64, I64, I64]
"""[R] where each range begins among some rows, how many rows it has, where it goes in the arena."""

Visit = Callable[[pa.Array, I64, I64, I64], None]
"""Sees a column go by: the values of some rows, and the `Ranges` among them that are read."""


@dataclass(frozen=True)
class _Task:
    """Some pieces of a file, and the ranges within each of them."""

    reader: SegmentReader
    pieces: list[Piece]
    ranges: list[Ranges]


def fill(
    parts: Sequence[FilePart],
    kinds: Mapping[str, pa.DataType],
    num_events: int,
    *,
    visits: Mapping[str, Visit],
    buffers: ArenaBuffers | None,
    threads: int | None,
) -> dict[str, pa.Array]:
    """The columns of an arena, [num_events] each; the targets of all parts cover it once.

    Args:
        kinds: the types of the columns, by name.
        visits: what is called with the pieces of a column as they are decoded, by name. Columns that
            are only visited take no memory.
        threads: that decode. None: one, or from a million events on one a core, at most 4.
    """
    arena = _Arena(kinds, num_events, visits, buffers or ArenaBuffers(0))
    tasks = list(_tasks(parts))
    if threads is None:
        threads = min(num_cores(), 4) if num_events >= _MANY_EVENTS else 1
    names = list(dict.fromkeys([*kinds, *visits]))
    if not names:
        return {}
    # Threads take one, and leave it to the next one.
    idle: deque[_Filler] = deque()

    def take(task: _Task, source: Any) -> None:
        try:
            filler = idle.pop()
        except IndexError:
            filler = _Filler(arena, names)
        filler.take(task, source)
        idle.append(filler)

    with _Ahead(tasks, names) as sources:
        if threads > 1 and len(tasks) > 1:
            with ThreadPoolExecutor(threads, thread_name_prefix="vlm-decode") as pool:
                running: deque[Future[None]] = deque()
                try:
                    for task, source in sources:
                        running.append(pool.submit(take, task, source))
                        if len(running) > threads:
                            running.popleft().result()
                    while running:
                        running.popleft().result()
                finally:
                    for future in running:
                        future.cancel()
        else:
            for task, source in sources:
                take(task, source)
    for filler in idle:
        filler.flush()
    return arena.columns()


def _tasks(parts: Sequence[FilePart]) -> Iterator[_Task]:
    for part in parts:
        pieces, starts = part.reader.pieces(part.rows, part.counts)
        ranges = _cut(pieces, starts, part.counts, part.targets)
        for at in range(0, len(pieces), _PIECES_AT_ONCE):
            end = at + _PIECES_AT_ONCE
            yield _Task(part.reader, pieces[at:end], ranges[at:end])


def _cut(pieces: Sequence[Piece], starts: I64, counts: I64, targets: I64) -> list[Ranges]:
    """The ranges of each piece: those that reach over a piece's end are cut there."""
    order = np.argsort(starts)
    starts, counts, targets = starts[order], counts[order], targets[order]
    if len(pieces) == 1:
        return [(starts, counts, targets)]
    ends = starts + counts
    begins = np.array([piece.begin for piece in pieces])
    owner = np.searchsorted(starts, begins) - 1  # the last range that begins before
    cut = (owner >= 0) & (ends[owner] > begins)
    owner = np.concatenate([np.arange(len(starts)), owner[cut]])
    parts = np.concatenate([starts, begins[cut]])
    order = np.argsort(parts, kind="stable")
    owner, parts = owner[order], parts[order]
    # Ranges are disjoint: one ends where the next begins only if it was cut there, or just ends.
    lengths = np.minimum(ends[owner], np.append(parts[1:], ends[-1])) - parts
    goes = targets[owner] + parts - starts[owner]
    bounds = np.append(np.searchsorted(parts, begins), len(parts)).tolist()
    return [
        (parts[low:high] - piece.begin, lengths[low:high], goes[low:high])
        for piece, low, high in zip(pieces, bounds, bounds[1:], strict=False)
    ]


class _Ahead:
    """Opens the tasks' files in order, some ahead of the one that is asked for."""

    def __init__(self, tasks: Sequence[_Task], names: Sequence[str]) -> None:
        self._tasks = deque(tasks)
        self._names = names
        self._open: deque[tuple[_Task, Any, int]] = deque()

    def __enter__(self) -> Iterator[tuple[_Task, Any]]:
        return iter(self._run())

    def _run(self) -> Iterator[tuple[_Task, Any]]:
        ahead = 0
        while self._tasks or self._open:
            while self._tasks and (not self._open or ahead < _AHEAD_BYTES):
                task = self._tasks.popleft()
                fetches = task.reader.fetches
                size = task.reader.num_bytes_of(self._names, task.pieces) if fetches else 0
                self._open.append((task, task.reader.open(self._names, task.pieces), size))
                ahead += size
                if not fetches:
                    break
            task, source, size = self._open.popleft()
            ahead -= size
            yield task, source

    def __exit__(self, *_: object) -> None:
        for _task, source, _size in self._open:
            if source is not None:
                source.close()


class _Arena:
    """The columns while they are filled. Tasks may run in any order and at the same time."""

    def __init__(
        self,
        kinds: Mapping[str, pa.DataType],
        num_events: int,
        visits: Mapping[str, Visit],
        buffers: ArenaBuffers,
    ) -> None:
        self._kinds = kinds
        self._num_events = num_events
        self._visits = visits
        widths = {name: width_of(kind) for name, kind in kinds.items()}
        self._memory = {
            name: buffers.empty(num_events, f"u{width}")
            for name, width in widths.items()
            if width is not None
        }
        # Of the other columns: the decoded pieces, and where their ranges lie in them and in the arena.
        self._pieces: dict[str, list[tuple[pa.Array, I64, I64, I64]]] = {
            name: [] for name, width in widths.items() if width is None
        }

    def place(self, name: str, values: pa.Array, ranges: Ranges, placement: Placement) -> None:
        """Copy ranges of some values of a column into place."""
        if name in self._visits:
            self._visits[name](values, *ranges)
        if name in self._memory:
            placement.copy(values, self._memory[name])
        elif name in self._pieces:
            self._pieces[name].append((values, *ranges))

    def columns(self) -> dict[str, pa.Array]:
        """All columns, once all tasks are done."""
        found = {name: self._gathered(name) for name in self._pieces}
        for name, memory in self._memory.items():
            found[name] = pa.Array.from_buffers(
                self._kinds[name], self._num_events, [None, pa.py_buffer(memory)], null_count=0
            )
        return found

    def _gathered(self, name: str) -> pa.Array:
        """Values without a fixed place: put all that was decoded in a row, gather from there."""
        if not self._pieces[name]:
            return pa.array([], self._kinds[name])
        decoded, starts, counts, targets = zip(*self._pieces[name], strict=True)
        sizes = np.array([len(values) for values in decoded])
        bases = np.cumsum(sizes) - sizes
        begins = np.concatenate([s + b for s, b in zip(starts, bases, strict=True)])
        order = np.argsort(np.concatenate(targets))
        return gather(pa.concat_arrays(decoded), begins[order], np.concatenate(counts)[order])


class _Filler:
    """Decodes tasks, one at a time, and copies what it found into place; small pieces together."""

    def __init__(self, arena: _Arena, names: Sequence[str]) -> None:
        self._arena = arena
        self._names = names
        self._held: dict[str, list[pa.Array]] = {name: [] for name in names}
        self._ranges: list[Ranges] = []
        self._num_rows = 0

    def take(self, task: _Task, source: Any) -> None:
        """Decode a task's pieces; those that are large enough are in place afterwards."""
        here = -1
        for at, name, column in task.reader.decode(source, self._names, task.pieces):
            values = _whole(column)
            if at != here:
                here = at
                alone = len(values) >= _ROWS_TOGETHER
                if alone:
                    placement = Placement(*task.ranges[at])
                else:
                    self._hold(len(values), *task.ranges[at])
            if alone:
                self._arena.place(name, values, task.ranges[at], placement)
            else:
                self._held[name].append(values)
        if self._num_rows >= _ROWS_TOGETHER:
            self.flush()

    def _hold(self, num_rows: int, starts: I64, counts: I64, targets: I64) -> None:
        """Begin with a piece that is held; the one before is complete."""
        if self._num_rows >= _ROWS_TOGETHER:
            self.flush()
        self._ranges.append((starts + self._num_rows, counts, targets))
        self._num_rows += num_rows

    def flush(self) -> None:
        """Copy all that is held into place."""
        if not self._ranges:
            return
        starts, counts, targets = (
            np.concatenate(parts) for parts in zip(*self._ranges, strict=True)
        )
        placement = Placement(starts, counts, targets)
        for name, pieces in self._held.items():
            values = pieces[0] if len(pieces) == 1 else pa.concat_arrays(pieces)
            self._arena.place(name, values, (starts, counts, targets), placement)
            pieces.clear()
        self._ranges.clear()
        self._num_rows = 0


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """A column of a piece; pieces of fixed-width values come in one chunk."""
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
