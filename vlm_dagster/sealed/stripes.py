"""How the rows of a file are laid out, so that the newest events of some users are few row groups.

A file's rows come in recency bands: first the newest `edges[0]` rows of every user, then the next
ones up to `edges[1]`, and so on; the last band holds the rest. Within a band users stand by
activity (the power of two below their number of rows, most active first), then by id, each user's
rows oldest first. The run of one user's rows in one band is a *stripe*.

Activity order matters where a file is read after newer ones: users whom the newer files satisfy are
the active ones, and they stand together, so that their row groups are not touched at all.

All of this follows from the users' row counts: nothing but the edges is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vlm_dagster.errors import SchemaError

__all__ = ["DEFAULT_EDGES", "Layout", "Stripes", "activity_of", "choose_edges", "rows_decoded"]

I64 = npt.NDArray[np.int64]

DEFAULT_EDGES = (128, 512, 2048, 8192)
# Rows of a row group by band, near bands first: a near row group is read for a few of its users, a
# far one mostly whole, where large row groups decode faster and weigh less in the footer.
_GROUP_ROWS = (4_096, 8_192, 32_768)
_FAR_GROUP_ROWS = 65_536


def activity_of(counts: I64) -> I64:
    """[U] the power of two at or below each count, as its exponent; counts are at least 1."""
    return np.asarray(np.frexp(counts.astype(np.float64))[1] - 1, np.int64)


@dataclass(frozen=True)
class Layout:
    """Where the stripes of a file's users lie, per band b and user u (in order of id).

    Attributes:
        lows: [B, U] the first of the user's rows (0 is the oldest) that stands in band b.
        highs: [B, U] the one past the last.
        starts: [B, U] the row of the file at which that stripe begins.
    """

    lows: I64
    highs: I64
    starts: I64


@dataclass(frozen=True)
class Stripes:
    """The bands of a file.

    Attributes:
        edges: ascending and positive; none means that there is one band, and that users stand in
            order of id.
    """

    edges: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        plain = all(isinstance(e, int) and not isinstance(e, bool) for e in self.edges)
        if not plain or any(b <= a for a, b in zip((0, *self.edges), self.edges, strict=False)):
            raise SchemaError(
                f"band edges {list(self.edges)!r} are not ascending positive integers",
                f"Give numbers of newest events, e.g. {list(DEFAULT_EDGES)}.",
            )
        if len(self.edges) > 32:
            raise SchemaError(f"{len(self.edges)} band edges are too many", "Give at most 32.")

    @property
    def num_bands(self) -> int:
        return len(self.edges) + 1

    def group_rows(self, band: int) -> int:
        """The most rows of a row group of a band."""
        if self.edges and band < len(_GROUP_ROWS):
            return _GROUP_ROWS[band]
        return _FAR_GROUP_ROWS

    def cut(self, counts: I64) -> tuple[I64, I64]:
        """[B, U] lows and highs; see `Layout`."""
        lower = np.array([0, *self.edges], np.int64)[:, None]
        highs = np.maximum(counts[None, :] - lower, 0)
        lows = np.vstack([highs[1:], np.zeros((1, len(counts)), np.int64)])
        return lows, highs

    def keys(self, counts: I64) -> I64:
        """[U] users stand in ascending order of (key, id) within a band."""
        return -activity_of(counts) if self.edges else np.zeros(len(counts), np.int64)

    def layout(self, counts: I64) -> Layout:
        """Where everything lies, for users (in order of id) with so many rows each."""
        lows, highs = self.cut(counts)
        order = np.argsort(self.keys(counts), kind="stable")
        sizes = (highs - lows)[:, order].ravel()
        ordered = (np.cumsum(sizes) - sizes).reshape(lows.shape)
        starts = np.empty_like(lows)
        starts[:, order] = ordered
        return Layout(lows, highs, starts)

    def rows_read(self, counts: I64, newest: I64) -> int:
        """Rows of the row groups that hold some of each user's newest rows: what reading these decodes.

        Args:
            counts: [U] rows of each user, at least 1.
            newest: [U] how many of them are read.
        """
        layout = self.layout(counts)
        # Of every stripe the newest rows are needed, those from `first` on.
        first = np.maximum(counts - newest, layout.lows)
        sizes = (layout.highs - layout.lows).sum(axis=1)
        found = 0
        for band, total in enumerate(sizes.tolist()):
            some = first[band] < layout.highs[band]
            begins = (layout.starts[band] + first[band] - layout.lows[band])[some]
            ends = (layout.starts[band] + layout.highs[band] - layout.lows[band])[some]
            size, base = self.group_rows(band), int(sizes[:band].sum())
            touched = np.zeros(-(-total // size) + 1, np.int64)
            np.add.at(touched, (begins - base) // size, 1)
            np.add.at(touched, (ends - base - 1) // size + 1, -1)
            groups = np.flatnonzero(np.cumsum(touched[:-1]))
            found += int(np.minimum(size, total - groups * size).sum())
        return found

    def upto(self, longest: int) -> Stripes:
        """Without the edges that no user's rows reach past."""
        return Stripes(tuple(e for e in self.edges if e < longest))

    @classmethod
    def of(cls, edges: Sequence[int]) -> Stripes:
        return cls(tuple(edges))


def choose_edges(files: I64, lengths: Sequence[int]) -> tuple[int, ...]:
    """The band edges with which reading these lengths decodes the fewest rows, by arithmetic, out of
    the default ones, ones at the lengths themselves, and ones that grow by 2, 4 or 8 from 32 to 512.

    Args:
        files: [F, U] events of each user in each file of a bucket, oldest first: `counts` of a
            `BucketIndex`, for example.
        lengths: [L] the newest events that models read; each counts alike.
    """
    longest = int(files.max(initial=1))
    tried = {DEFAULT_EDGES, tuple(sorted(set(lengths)))}
    for first in (32, 64, 128, 256, 512):
        for step in (2, 4, 8):
            edges = (first * step**power for power in range(longest.bit_length()))
            tried.add(tuple(edge for edge in edges if edge < longest)[:32])

    def cost(edges: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        needed = (np.minimum(files.sum(axis=0), length).sum() for length in lengths)
        read = (rows_decoded(files, length, edges) for length in lengths)
        shares = (rows / max(int(least), 1) for rows, least in zip(read, needed, strict=True))
        # Every edge cuts users' rows once more, which reading all of them pays for.
        return sum(shares) * 1.01 ** len(edges), edges

    return min(tried, key=cost)


def rows_decoded(files: I64, newest: int, edges: tuple[int, ...]) -> int:
    """Rows that reading the newest events of every user of a bucket decodes.

    Args:
        files: [F, U] events of each user in each file, oldest first.
    """
    left = np.full(files.shape[1], newest, np.int64)
    found = 0
    for counts in files[::-1]:
        here = counts > 0
        if here.any():
            wanted = np.minimum(left, counts)
            found += Stripes(edges).rows_read(counts[here], wanted[here])
            left -= wanted
    return found
