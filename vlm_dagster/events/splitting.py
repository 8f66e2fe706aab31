"""A stream of events split by window, in bounded memory and with bounded open files.

Rows are buffered by window. When the buffer is full it is written out as one run: an Arrow IPC
file with one batch a window. At the end each window is read back from the runs, oldest run first,
so its rows keep the order in which they came, however the windows were mixed in the input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vlm_dagster.windows import WindowGrid

__all__ = ["WindowSplitter"]


@dataclass(frozen=True)
class _Run:
    path: Path
    batch_of: dict[int, int]  # window index -> batch number


class WindowSplitter:
    """Takes batches and gives them back window by window.

    Args:
        schema: of every batch.
        time: the column whose window counts; it holds no nulls.
        grid: which windows.
        scratch: a folder for runs.
        max_buffered_bytes: what to hold in memory before a run is written.
    """

    def __init__(
        self,
        schema: pa.Schema,
        time: str,
        grid: WindowGrid,
        scratch: Path,
        max_buffered_bytes: int,
    ) -> None:
        self._schema = schema
        self._time = time
        self._grid = grid
        self._scratch = scratch
        self._max_bytes = max_buffered_bytes
        self._buffer: dict[int, list[pa.RecordBatch]] = {}
        self._buffered_bytes = 0
        self._runs: list[_Run] = []
        self.first_us: int | None = None
        self.last_us: int | None = None

    def add(self, batch: pa.RecordBatch) -> None:
        """Take these rows."""
        if batch.num_rows == 0:
            return
        times = batch.column(self._time).cast(pa.int64()).to_numpy()
        earliest, latest = int(times.min()), int(times.max())
        self.first_us = earliest if self.first_us is None else min(self.first_us, earliest)
        self.last_us = latest if self.last_us is None else max(self.last_us, latest)
        first = self._grid.containing(earliest)
        if latest < first.end_us:
            self._buffer.setdefault(first.index, []).append(batch)
        else:
            # Windows are consecutive, so counting from one of them gives the index of another.
            indexes = first.index + (times - first.start_us) // self._grid.length_us
            self._scatter(batch, indexes)
        self._buffered_bytes += batch.nbytes
        if self._buffered_bytes >= self._max_bytes:
            self._spill()

    def _scatter(self, batch: pa.RecordBatch, indexes: npt.NDArray[np.int64]) -> None:
        if np.any(indexes[1:] < indexes[:-1]):
            order = np.argsort(indexes, kind="stable")
            batch, indexes = batch.take(pa.array(order)), indexes[order]
        starts = np.flatnonzero(np.diff(indexes, prepend=indexes[0] - 1))
        for start, end in zip(starts, [*starts[1:], len(indexes)], strict=True):
            part = batch.slice(int(start), int(end - start))
            self._buffer.setdefault(int(indexes[start]), []).append(part)

    def _spill(self) -> None:
        path = self._scratch / f"run-{len(self._runs)}.arrow"
        batch_of: dict[int, int] = {}
        with pa.ipc.new_file(path, self._schema) as writer:
            for index, parts in self._buffer.items():
                whole = parts[0] if len(parts) == 1 else pa.concat_batches(parts)
                batch_of[index] = len(batch_of)
                writer.write_batch(whole)
        self._runs.append(_Run(path, batch_of))
        self._buffer.clear()
        self._buffered_bytes = 0

    def window_indexes(self) -> list[int]:
        """The windows that got rows, oldest first."""
        return sorted(set(self._buffer).union(*(run.batch_of for run in self._runs)))

    def windows(self) -> Iterator[tuple[int, Iterator[pa.RecordBatch]]]:
        """Each window that got rows, oldest first, with its rows in the order they came in."""
        # Read, not mapped: mapped pages would count as memory of this process until the end.
        readers = [pa.ipc.open_file(pa.OSFile(str(run.path))) for run in self._runs]

        def rows(index: int) -> Iterator[pa.RecordBatch]:
            for run, reader in zip(self._runs, readers, strict=True):
                if index in run.batch_of:
                    yield reader.get_batch(run.batch_of[index])
            yield from self._buffer.pop(index, ())

        for index in self.window_indexes():
            yield index, rows(index)
