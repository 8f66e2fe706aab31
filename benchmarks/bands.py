"""What reading the newest events costs under a layout, by arithmetic alone: no file is written.

Given how many events each user of one bucket has on each day, and a layout (the fan-out of
size-tiered compaction, the edges of the recency bands, the rows of a row group), this counts the
rows of all row groups that hold at least one needed row, over the rows needed. Within a band
users are ordered by activity class (floor(log2(count in this segment)), descending), then id.

`python -m benchmarks.bands` prints the table.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm_dagster.sealed.stripes import DEFAULT_EDGES, choose_edges, rows_decoded

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """How a history is laid out, and how many users a unit reads at once (0: a whole bucket)."""

    edges: tuple[int, ...]
    row_group: int
    fanout: int
    users_per_unit: int = 0


def daily_counts(users: int, mean: float, days: int, sigma: float, seed: int = 0) -> Ints:
    """Events of each user on each day, `[users, days]`: Poisson around rates that are lognormal
    over users, `mean` events a user over all days, at least 100."""
    rng = np.random.default_rng(seed)
    totals = np.maximum(rng.lognormal(0, sigma, users), 1e-9)
    totals = np.maximum(totals * (mean / totals.mean()), 100)
    return rng.poisson(totals[:, None] / days, (users, days)).astype(np.int64)


def segments(days: int, fanout: int) -> list[tuple[int, int]]:
    """The runs of days `[start, end)`, oldest first, that size-tiered compaction leaves: the
    digits of `days` in base `fanout`, the largest first."""
    if fanout < 2:
        return [(day, day + 1) for day in range(days)]
    sizes = [1]
    while sizes[-1] * fanout <= days:
        sizes.append(sizes[-1] * fanout)
    runs: list[tuple[int, int]] = []
    start = 0
    for size in reversed(sizes):
        while start + size <= days:
            runs.append((start, start + size))
            start += size
    return runs


def _rows_decoded(counts: Ints, wanted: Ints, layout: Layout) -> int:
    """Rows of the row groups of one file that hold one of the `wanted` newest rows of a user.

    `counts` and `wanted` are `[users]` for one segment. Every unit opens the file on its own, so a
    row group that two units need counts twice.
    """
    active_class = np.full(len(counts), -1)
    some = counts > 0
    active_class[some] = np.floor(np.log2(counts[some])).astype(np.int64)
    order = np.lexsort((np.arange(len(counts)), -active_class))
    unit = np.arange(len(counts)) // (layout.users_per_unit or len(counts))
    decoded = 0
    for low, high in itertools.pairwise((0, *layout.edges, sys.maxsize)):
        rows = np.clip(counts - low, 0, high - low)
        needed = np.minimum(np.clip(wanted - low, 0, None), rows)
        total = int(rows.sum())
        if total == 0 or not needed.any():
            continue
        ends = np.empty(len(counts), np.int64)
        ends[order] = np.cumsum(rows[order])
        reads = needed > 0
        first = (ends - needed)[reads] // layout.row_group
        last = (ends - 1)[reads] // layout.row_group
        num_groups = -(-total // layout.row_group)
        width = int((last - first).max()) + 1
        touched = first[:, None] + np.arange(width)
        inside = touched <= last[:, None]
        keys = np.unique((unit[reads][:, None] * num_groups + touched)[inside]) % num_groups
        decoded += int(np.minimum(layout.row_group, total - keys * layout.row_group).sum())
    return decoded


def read_newest(counts: Ints, newest: int, layout: Layout) -> tuple[int, int]:
    """Rows decoded and rows needed for the newest so many events of every user; `counts` is
    `[users, days]`."""
    left = np.full(len(counts), newest, np.int64)
    decoded = needed = 0
    for start, end in reversed(segments(counts.shape[1], layout.fanout)):
        inside = counts[:, start:end].sum(axis=1)
        wanted = np.minimum(left, inside)
        decoded += _rows_decoded(inside, wanted, layout)
        needed += int(wanted.sum())
        left -= wanted
    return decoded, needed


EDGES = ((128, 512, 2048), (64, 256, 1024, 4096), (32, 128, 512, 2048, 8192), (256, 1024, 4096))
ROW_GROUPS = (1024, 2048, 4096, 8192, 16384, 65536)


def main() -> None:
    """Print rows decoded / rows needed for buckets of 62, 500 and 2,000 users."""
    for users in (62, 500, 2000):
        counts = daily_counts(users, 16_000, 365, 1.5)
        totals = np.sort(counts.sum(axis=1))
        print(
            f"\n{users} users a bucket, 365 days, events a user: mean {totals.mean():,.0f}, least "
            f"{totals[0]:,}, median {totals[users // 2]:,}, most {totals[-1]:,}; newest 256 of each"
        )
        print(f"{'fan-out':>7} {'unit':>5}  {'edges':<26}", *(f"{r:>7}" for r in ROW_GROUPS))
        for fanout, unit, edges in itertools.product((1, 4, 8, 16), (0, 256), EDGES):
            if unit >= users or (fanout == 1 and unit):
                continue
            ratios = []
            for row_group in ROW_GROUPS:
                decoded, needed = read_newest(counts, 256, Layout(edges, row_group, fanout, unit))
                ratios.append(f"{decoded / needed:>7.2f}")
            name = ",".join(map(str, edges))
            print(f"{fanout if fanout > 1 else '-':>7} {unit or 'all':>5}  {name:<26}", *ratios)
    choices()


def choices() -> None:
    """Print the same for the default edges and for those that `choose_edges` finds."""
    print("\nrows decoded / needed, by the newest events read; edges by default and as chosen")
    for users, mean in ((500, 16_000), (2000, 16_000), (500, 1_000)):
        counts = daily_counts(users, mean, 365, 1.5)
        files = np.stack([counts[:, a:b].sum(axis=1) for a, b in segments(365, 8)])
        for lengths in ((256,), (50, 1_000), (100, 400, 5_000)):
            for edges in (DEFAULT_EDGES, choose_edges(files, lengths)):
                ratios = []
                for length in lengths:
                    needed = int(np.minimum(files.sum(axis=0), length).sum())
                    ratios.append(f"{length}: {rows_decoded(files, length, edges) / needed:.2f}")
                name = ",".join(map(str, edges))
                print(f"{users:>5} users of {mean:>6,}  {name:<26}", *ratios)


if __name__ == "__main__":
    main()
