"""Users' histories in memory, and how they get there from the files of many windows.

An arena holds one contiguous array a trait, each user's events adjacent, oldest first. It is filled
by arithmetic: the index in every file's footer says how many events each user has there and in
which bands they lie, so the positions of all of them, and with those the row ranges to read, are
known before a column is touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vlm_dagster.history.buffers import ArenaBuffers
from vlm_dagster.history.filling import FilePart, Visit, fill
from vlm_dagster.sealed.reader import SegmentReader

__all__ = ["BucketIndex", "Histories"]

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Histories:
    """Events of some users.

    Attributes:
        user_ids: [U], in the order asked for.
        offsets: [U + 1]; user i's events are `[offsets[i], offsets[i + 1])` of every column,
            oldest first.
        columns: per trait, [offsets[-1]]; never null.
        end_positions: [U] the position just past each user's last event here, so the first one
            has position `end_positions[i] - (offsets[i + 1] - offsets[i])`.
    """

    user_ids: pa.Array
    offsets: I64
    columns: dict[str, pa.Array]
    end_positions: I64

    @property
    def lengths(self) -> I64:
        """[U] events of each user here."""
        return np.diff(self.offsets)

    @property
    def num_events(self) -> int:
        return int(self.offsets[-1])

    def of(self, row: int) -> dict[str, pa.Array]:
        """The events of the user at `row`, per trait."""
        start, end = int(self.offsets[row]), int(self.offsets[row + 1])
        return {name: values.slice(start, end - start) for name, values in self.columns.items()}


def find_sorted(haystack: pa.Array, needles: pa.Array) -> I64:
    """Where each needle stands in a sorted haystack of distinct ids, -1 if nowhere; needles are
    sorted and distinct."""
    if not len(haystack) or not len(needles):
        return np.full(len(needles), -1, np.int64)
    if pa.types.is_integer(haystack.type):
        ids = haystack.to_numpy(zero_copy_only=False)
        wanted = needles.to_numpy(zero_copy_only=False)
        at = np.searchsorted(ids, wanted)
        at[at == len(ids)] = 0
        return np.where(ids[at] == wanted, at, -1).astype(np.int64)
    found = pc.index_in(needles, value_set=haystack)
    return np.asarray(pc.fill_null(found, -1).to_numpy(zero_copy_only=False), np.int64)


class BucketIndex:
    """Where the events of some users lie in a run of files, oldest window first.

    Args:
        readers: the files of all buckets of these users, in window order.
        user_ids: [U] sorted and distinct.
        schema: the types of the columns, for when there is nothing to read.
        aliases: columns that are not stored, and the stored ones that they equal.
        gone: [U] how many of each user's oldest events no file holds any more; None means none.
        cut: by number of a file, [U] how many of each user's events there count, the oldest
            ones; all where it is not given.
    """

    def __init__(
        self,
        readers: Sequence[SegmentReader],
        user_ids: pa.Array,
        schema: pa.Schema,
        aliases: Mapping[str, str] = MappingProxyType({}),
        *,
        gone: I64 | None = None,
        cut: Mapping[int, I64] = MappingProxyType({}),
    ) -> None:
        self._readers = list(readers)
        self._schema = schema
        self._aliases = aliases
        self.user_ids = user_ids
        shape = (len(self._readers), len(user_ids))
        self._at = np.full(shape, -1, np.int64)
        self._counts = np.zeros(shape, np.int64)
        for i, reader in enumerate(self._readers):
            at = find_sorted(reader.users.user_ids, user_ids)
            known = at >= 0
            self._at[i] = at
            self._counts[i, known] = reader.users.counts[at[known]]
            if i in cut:
                self._counts[i] = np.minimum(self._counts[i], cut[i])
        self.gone = np.zeros(len(user_ids), np.int64) if gone is None else gone
        self._ends = np.cumsum(self._counts, axis=0) + self.gone

    @property
    def num_events(self) -> I64:
        """[U] each user's events, those that are gone included: the end position of the history."""
        return self.num_events_before(len(self._readers))

    @property
    def counts(self) -> I64:
        """[F, U] each user's events in each of the files, oldest first."""
        return self._counts

    def num_events_before(self, num_files: int) -> I64:
        """[U] the position at which each user's events in the first so many files end."""
        return np.asarray(self._ends[num_files - 1]) if num_files else self.gone

    def extreme(self, name: str, keep: Literal["min", "max"]) -> I64:
        """[U] the least or greatest of what the files' indices keep about each user under
        `name`; 0 for a user without rows."""
        blank = np.iinfo(np.int64).max if keep == "min" else np.iinfo(np.int64).min
        found = np.full(len(self.user_ids), blank)
        pick = np.minimum if keep == "min" else np.maximum
        for reader, at in zip(self._readers, self._at, strict=True):
            some = np.flatnonzero(at >= 0)
            found[some] = pick(found[some], reader.users.extremes[name][at[some]])
        return np.where(found == blank, 0, found)

    def users(self, low: int, high: int) -> BucketIndex:
        """The index of only the users `[low, high)` of this one."""
        part = copy(self)
        part.user_ids = self.user_ids.slice(low, high - low)
        part.gone = self.gone[low:high]
        for name in ("_at", "_counts", "_ends"):
            setattr(part, name, getattr(self, name)[:, low:high])
        return part

    def read(
        self,
        columns: Sequence[str],
        first: I64,
        end: I64,
        *,
        visits: Mapping[str, Visit] = MappingProxyType({}),
        buffers: ArenaBuffers | None = None,
        threads: int | None = 1,
    ) -> Histories:
        """The events at positions `[first[i], end[i])` of each user i; only files that hold
        some of them are read.

        Memory: the events themselves, and what is decoded at once of one file for each thread.
        Columns of strings and booleans take twice their size while they are read.

        Args:
            columns: the columns to decode.
            first: [U], at least `gone` and at most `end`.
            end: [U], at most `num_events`.
            visits: by column, what is called with its values piece by piece, in no order; a column
                that is only visited takes no memory. Events have their places in `Histories`.
            buffers: memory to read into; fresh memory if None.
            threads: that decode. None: one, or from a million events on one a core, at most 4.
        """
        assert (first >= self.gone).all(), "events are asked for that are gone"
        stored = [self._aliases.get(name, name) for name in columns]
        kinds = {name: self._schema.field(name).type for name in stored}
        begins = self._ends - self._counts
        low = np.clip(first[None, :] - begins, 0, self._counts)
        high = np.clip(end[None, :] - begins, 0, self._counts)
        bounds = np.concatenate([[0], np.cumsum(end - first)]).astype(np.int64)
        assert (high - low).sum() == bounds[-1], "asked for events that are not in these files"
        # Where position 0 of each user would stand in the arena.
        origins = bounds[:-1] - first
        parts: list[FilePart] = []
        for i, reader in enumerate(self._readers):
            some = np.flatnonzero(high[i] > low[i])
            if not len(some):
                continue
            rows, counts, lows = self._stripes(
                reader, self._at[i, some], low[i, some], high[i, some]
            )
            targets = lows + (origins + begins[i])[some]
            held = counts > 0
            parts.append(FilePart(reader, rows[held], counts[held], targets[held]))
        seen = {self._aliases.get(name, name): visit for name, visit in visits.items()}
        found = fill(parts, kinds, int(bounds[-1]), visits=seen, buffers=buffers, threads=threads)
        values = {name: found[at] for name, at in zip(columns, stored, strict=True)}
        return Histories(self.user_ids, bounds, values, end.astype(np.int64))

    @staticmethod
    def _stripes(reader: SegmentReader, at: I64, low: I64, high: I64) -> tuple[I64, I64, I64]:
        """The rows `[low, high)` of some users of a file, as row ranges of the file, [B, U]: where
        they begin there, how many they are, and which of the user's rows is the first of them."""
        layout = reader.users.layout
        lows = np.maximum(low, layout.lows[:, at])
        counts = np.maximum(np.minimum(high, layout.highs[:, at]) - lows, 0)
        return layout.starts[:, at] + lows - layout.lows[:, at], counts, lows
