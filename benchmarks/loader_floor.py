"""The floor: decode what the examples need once, and copy it once an example. Nothing is checked, found
or put together, and none of the loader's code is used.

Which row groups hold something that is needed is found out beforehand, at no cost. A history lies in
bands and in several files; the floor copies as many values as an example has, from what was decoded
with it, and not the very values: putting a history together first is work that it leaves out.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.loader_data import BATCH, TRAITS, Data
from vlm_dagster.hashing import bucket_of

__all__ = ["Floor"]

I64 = npt.NDArray[np.int64]

_PIECE = 131_072
_UNIT = 500_000


@dataclass(frozen=True)
class _Unit:
    """What is decoded together, by file: pieces of row groups; and its examples' users and lengths."""

    pieces: list[tuple[str, list[int]]]
    users: list[int]
    lengths: list[int]


class Floor:
    """Bare loops over the files of one table.

    Attributes:
        num_examples: of an epoch.
        num_events: in the row groups that the examples need.
    """

    def __init__(self, data: Data, length: int) -> None:
        examples = data.examples
        lengths = np.minimum(examples.lengths, length)
        self.num_examples = len(examples)
        self.num_events = 0
        snapshot = data.snapshot()
        self._files: dict[str, pq.FileMetaData] = {}
        by_bucket: dict[int, list[str]] = {}
        for row in snapshot.files().to_pylist():
            path = str(Path(data.history_uri, row["path"]))
            by_bucket.setdefault(int(row["bucket"]), []).append(path)
            self._files[path] = pq.read_metadata(path)
        of = bucket_of(pa.array(examples.user_ids), snapshot.num_buckets)
        self._units: list[_Unit] = []
        for bucket, paths in sorted(by_bucket.items()):
            mine = of == bucket
            pieces = self._needed(paths, examples.user_ids[mine], examples.times[mine], length)
            self._units += _cut(pieces, examples.user_ids[mine].tolist(), lengths[mine].tolist())

    def _needed(
        self, paths: list[str], users: I64, times: I64, length: int
    ) -> list[tuple[str, list[int], int]]:
        """Pieces of the row groups that hold an event which some example sees, and their rows."""
        keys = [pq.read_table(path, columns=["user_id", "event_time"]) for path in paths]
        whole = pa.concat_tables(keys)
        owner = whole["user_id"].to_numpy()
        at = whole["event_time"].cast(pa.int64()).to_numpy()
        order = np.lexsort((at, owner))
        owner, at = owner[order], at[order]
        needed = np.zeros(len(order), np.int8)
        # How many examples begin to see an event and how many cease to: the running sum sees it.
        change = np.zeros(len(order) + 1, np.int64)
        begin = np.searchsorted(owner, users)
        ends = begin + _count_before(owner, at, users, times)
        np.add.at(change, np.maximum(ends - length, begin), 1)
        np.add.at(change, ends, -1)
        needed[order] = np.cumsum(change[:-1]) > 0
        found = []
        row = 0
        for path in paths:
            held: list[int] = []
            rows = 0
            meta = self._files[path]
            for group in range(meta.num_row_groups):
                count = meta.row_group(group).num_rows
                if needed[row : row + count].any():
                    if held and rows + count > _PIECE:
                        found.append((path, held, rows))
                        held, rows = [], 0
                    held.append(group)
                    rows += count
                row += count
            if held:
                found.append((path, held, rows))
        self.num_events += sum(rows for _, _, rows in found)
        return found

    def examples_per_s(self, num_threads: int, *, copies: bool) -> float:
        """Examples of an epoch a second.

        Args:
            copies: False only decodes, as sequences that share events would need.
        """
        memory = [_Memory(self._units) for _ in range(num_threads)] if copies else []
        threads = [
            threading.Thread(
                target=self._run, args=(self._units[i::num_threads], memory[i] if copies else None)
            )
            for i in range(num_threads)
        ]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.num_examples / (time.perf_counter() - start)

    def _run(self, units: list[_Unit], memory: _Memory | None) -> None:
        opened: dict[str, pq.ParquetFile] = {}
        for unit in units:
            decoded = []
            for path, groups in unit.pieces:
                if path not in opened:
                    meta = self._files[path]
                    opened[path] = pq.ParquetFile(path, metadata=meta, pre_buffer=False)
                decoded.append(
                    opened[path].read_row_groups(groups, columns=TRAITS, use_threads=False)
                )
            if memory is not None:
                memory.copy(decoded, unit)


class _Memory:
    """The tensors that batches are copied into, over and over."""

    def __init__(self, units: list[_Unit]) -> None:
        longest = max((max(unit.lengths, default=0) for unit in units), default=0)
        types = {"item_id": np.int64, "author_id": np.int64, "category": np.int32}
        self._out = [np.ones(BATCH * longest, types.get(name, np.float32)) for name in TRAITS]

    def copy(self, decoded: list[pa.Table], unit: _Unit) -> None:
        """Batches of as many values as the examples have, those of a user from the same place."""
        # By memory views, a trait at a time: less overhead than numpy's slices, and better cached.
        sources = [
            [chunk.to_numpy().data for chunk in batch.columns]
            for table in decoded
            for batch in table.to_batches()
        ]
        sizes = [len(source[0]) for source in sources]
        for first in range(0, len(unit.lengths), BATCH):
            lengths = unit.lengths[first : first + BATCH]
            copies = []
            at = 0
            for user, length in zip(unit.users[first : first + BATCH], lengths, strict=True):
                left, turn = length, user
                while left:
                    which = turn % len(sources)
                    take = min(left, sizes[which])
                    begin = (user * 977) % (sizes[which] - take + 1)
                    copies.append((at, at + take, which, begin, begin + take))
                    at += take
                    left -= take
                    turn += 1
            for trait, out in enumerate(self._out):
                view = out.data
                columns = [source[trait] for source in sources]
                for low, high, which, begin, end in copies:
                    view[low:high] = columns[which][begin:end]
                torch.from_numpy(out[:at])
            torch.from_numpy(np.append(0, np.cumsum(lengths)))


def _count_before(owner: I64, at: I64, users: I64, times: I64) -> I64:
    """How many of its user's events come before each example."""
    span = int(at.max() - at.min()) + 2 if len(at) else 1
    low = int(at.min()) if len(at) else 0
    first, rank = np.unique(owner, return_inverse=True)
    place = np.searchsorted(first, users)
    keys = rank * span + (at - low)
    wanted = place * span + np.clip(times - low, 0, span - 1)
    return np.searchsorted(keys, wanted) - np.searchsorted(owner, users)


def _cut(
    pieces: list[tuple[str, list[int], int]], users: list[int], lengths: list[int]
) -> list[_Unit]:
    """Units of about so many rows; examples go with them in proportion."""
    total = sum(rows for _, _, rows in pieces)
    units = []
    held: list[tuple[str, list[int]]] = []
    rows = done = first = 0
    for number, (path, groups, count) in enumerate(pieces):
        held.append((path, groups))
        rows += count
        last = number == len(pieces) - 1
        if rows >= _UNIT or last:
            done += rows
            end = len(lengths) if last else len(lengths) * done // max(total, 1)
            units.append(_Unit(held, users[first:end], lengths[first:end]))
            held, rows, first = [], 0, end
    return units
