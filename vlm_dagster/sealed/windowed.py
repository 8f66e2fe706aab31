"""Digests of rows, window by window: what ties the files of a run of windows to what was sealed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from vlm_dagster.hashing import Digest, digest_rows
from vlm_dagster.windows import Window

__all__ = ["window_digests"]


def window_digests(
    clock: str, windows: Sequence[Window]
) -> Callable[[pa.RecordBatch | pa.Table], dict[str, Digest]]:
    """A function from rows to their digest in each window, by the window's segment name.

    Args:
        clock: the column of the time that puts a row into a window.
        windows: contiguous and ascending. A row outside of them is an error.
    """
    starts = np.array([window.start_us for window in windows], np.int64)
    end = windows[-1].end_us

    def digests(rows: pa.RecordBatch | pa.Table) -> dict[str, Digest]:
        if len(windows) == 1:
            return {windows[0].segment: digest_rows(rows)}
        times = np.asarray(rows.column(clock).cast(pa.int64()), np.int64)
        if len(times) and (times.min() < starts[0] or times.max() >= end):
            raise ValueError(f"rows lie outside {windows[0].key} to {windows[-1].key}")
        which = (np.searchsorted(starts, times, side="right") - 1).astype(np.uint16)
        order = np.argsort(which, kind="stable")
        counts = np.bincount(which, minlength=len(windows))
        ordered = rows.take(pa.array(order))
        found = {}
        begin = 0
        for i in np.flatnonzero(counts).tolist():
            found[windows[i].segment] = digest_rows(ordered.slice(begin, int(counts[i])))
            begin += int(counts[i])
        return found

    return digests
