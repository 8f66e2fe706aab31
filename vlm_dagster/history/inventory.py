"""What the files of a history hold: segments, bands, bytes a trait. Footers only, no rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from vlm_dagster.history.snapshot import Snapshot

__all__ = ["Band", "SegmentInfo", "TraitBytes", "inventory"]


@dataclass(frozen=True)
class SegmentInfo:
    """A segment of a snapshot: its windows by key, files, rows, bytes."""

    name: str
    first: str
    last: str
    num_windows: int
    num_files: int
    num_rows: int
    num_bytes: int


@dataclass(frozen=True)
class Band:
    """A recency band over all files: the events that are newer than at most `edge` others of
    their user in the same file, and not in a nearer band. None: the rest."""

    edge: int | None
    num_rows: int
    num_row_groups: int


@dataclass(frozen=True)
class TraitBytes:
    """A column over all files, in bytes; footers and indices are the column None."""

    name: str | None
    stored: int
    uncompressed: int


def inventory(
    snapshot: Snapshot,
) -> tuple[list[SegmentInfo], list[Band], list[TraitBytes], int]:
    """Segments oldest first, bands near first, columns in order; and how many files lack our index.

    Bands and columns are those of the files with an index.
    """
    grid = snapshot.grid
    files = snapshot.files().to_pylist()
    rows, sizes, counts = Counter[str](), Counter[str](), Counter[str]()
    for file in files:
        rows[file["segment"]] += file["num_rows"]
        sizes[file["segment"]] += file["size_bytes"]
        counts[file["segment"]] += 1
    segments = [
        SegmentInfo(
            name=one.name,
            first=grid.at(one.first).key,
            last=grid.at(one.last).key,
            num_windows=one.num_windows,
            num_files=counts[one.name],
            num_rows=rows[one.name],
            num_bytes=sizes[one.name],
        )
        for one in snapshot.segments
    ]
    bands: dict[int | None, list[int]] = {}
    stored, plain = Counter[str](), Counter[str]()
    foreign = own_bytes = 0
    for reader in snapshot.readers():
        if not reader.has_index:
            foreign += 1
            continue
        layout = reader.users.layout
        in_band = (layout.highs - layout.lows).sum(axis=1)
        groups = np.diff(np.searchsorted(reader.group_ends, np.cumsum(in_band)), prepend=-1)
        edges = [*reader.header["bands"], None]
        for edge, num, num_groups in zip(edges, in_band.tolist(), groups.tolist(), strict=False):
            found = bands.setdefault(edge, [0, 0])
            found[0] += num
            found[1] += num_groups
        for name, num_bytes in reader.column_bytes.items():
            stored[name] += int(num_bytes.sum())
            own_bytes -= int(num_bytes.sum())
        plain.update(reader.uncompressed_bytes)
        own_bytes += next(f["size_bytes"] for f in files if f["path"] == reader.path)
    ordered = sorted(bands.items(), key=lambda item: (item[0] is None, item[0] or 0))
    columns = [TraitBytes(name, stored[name], plain[name]) for name in stored]
    columns.append(TraitBytes(None, own_bytes, own_bytes))
    return segments, [Band(edge, n, g) for edge, (n, g) in ordered], columns, foreign
