"""Histories and pointers of one shape, and the same examples as rows that any layout can be written of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from benchmarks.data import GRID, day, events
from vlm_dagster import FeatureGroup, HistoryStore, PointerDataset, Projection, Trait
from vlm_dagster.history import Snapshot
from vlm_dagster.pointers import PointerSnapshot
from vlm_dagster.sealed.gathering import gather

__all__ = [
    "BATCH",
    "GROUP",
    "TRAITS",
    "Data",
    "Examples",
    "Shape",
    "folder_bytes",
    "history_day",
    "requests_day",
]

I64 = npt.NDArray[np.int64]

BATCH = 256
TRAITS = ["item_id", "author_id", "category", "dwell_seconds"]
GROUP = FeatureGroup(
    "events",
    [
        Trait("item_id", pa.int64()),
        Trait("author_id", pa.int64()),
        Trait("category", pa.int32()),
        Trait("dwell_seconds", pa.float32()),
    ],
)


@dataclass(frozen=True)
class Shape:
    """A table of the benchmark.

    Attributes:
        num_users: all equally active.
        history: events of each user, spread evenly over the days.
        num_days: sealed as daily windows.
        per_day: examples of each user and day, at random times of the day.
        length: the newest so many events before an example are its sequence.
        example_days: the last so many days have examples.
        num_buckets: None makes a bucket a million events, so that the loader's units are whole buckets.
    """

    num_users: int
    history: int
    per_day: int
    length: int
    num_days: int = 3
    example_days: int = 1
    num_buckets: int | None = None

    @property
    def buckets(self) -> int:
        return self.num_buckets or max(4, -(-self.num_users * self.history // 1_000_000))

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in vars(self).values())


class Data:
    """The history and the pointers of a shape, built in a folder unless they are there already."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        self.shape = shape
        self.folder = folder / shape.name
        self.history_uri = str(self.folder / "history")
        self.pointers_uri = str(self.folder / "pointers")
        # Written last, so that a folder kept from an interrupted run is built anew.
        done = self.folder / "built"
        if not done.exists():
            self._build()
            done.touch()

    def _build(self) -> None:
        shape = self.shape
        store = HistoryStore.create(self.history_uri, GROUP, num_buckets=shape.buckets)
        pointers = PointerDataset.create(
            self.pointers_uri,
            [GROUP.name],
            request="request_time",
            max_length=shape.length,
            num_buckets=shape.buckets,
        )
        per_day = shape.history // shape.num_days
        for number in range(shape.num_days):
            store.seal(day(number), history_day(number, shape.num_users, per_day))
            if number >= shape.num_days - shape.example_days:
                requests = requests_day(number, shape.num_users, shape.per_day)
                pointers.seal(day(number), requests, {GROUP.name: store.snapshot()})

    def snapshot(self) -> Snapshot:
        return HistoryStore.open(self.history_uri).snapshot()

    def pointers(self) -> PointerSnapshot:
        return PointerDataset.open(self.pointers_uri).snapshot()

    @property
    def stored_bytes(self) -> int:
        """Of history and pointers, logs included."""
        return folder_bytes(Path(self.history_uri)) + folder_bytes(Path(self.pointers_uri))

    def events_of(self, users: I64) -> pa.Table:
        """All events of some users by user and time, with their times, in memory."""
        names = ["event_time", *TRAITS]
        histories = self.snapshot().read(pa.array(users), Projection(names))
        owners = np.repeat(users, histories.lengths)
        return pa.table({"user_id": owners, **{name: histories.columns[name] for name in names}})

    @cached_property
    def examples(self) -> Examples:
        return Examples.of(self.pointers(), self.snapshot())


def history_day(number: int, num_users: int, per_day: int) -> pa.Table:
    """Events of one day in order of time, equally many of each user."""
    table = events(number, 1, num_users * per_day).drop_columns(["action"])
    users = np.repeat(np.arange(num_users), per_day)
    table = table.set_column(
        0, "user_id", pa.array(np.random.default_rng(number).permutation(users))
    )
    at = table.schema.get_field_index("category")
    return table.set_column(at, "category", table["category"].cast(pa.int32()))


def requests_day(number: int, num_users: int, per_day: int) -> pa.Table:
    """Requests of one day at random times, equally many of each user."""
    window = GRID.parse(day(number))
    num = num_users * per_day
    times = np.random.default_rng([1, number]).integers(window.start_us, window.end_us, num)
    return pa.table(
        {
            "user_id": np.repeat(np.arange(num_users), per_day),
            "request_id": np.arange(num),
            "request_time": pa.array(times, pa.timestamp("us", "UTC")),
        }
    )


@dataclass(frozen=True)
class Examples:
    """All examples, as row ranges of all histories in memory.

    Attributes:
        user_ids, times: [P] by (bucket, user, time), times in UTC microseconds.
        starts, lengths: [P] what each example sees of the columns.
        columns: per trait, [N]; each user's events adjacent, oldest first.
    """

    user_ids: I64
    times: I64
    starts: I64
    lengths: I64
    columns: dict[str, pa.Array]

    @classmethod
    def of(cls, pointers: PointerSnapshot, snapshot: Snapshot) -> Examples:
        names = ("end_position", "length")
        table = pointers.to_table(
            ["user_id", "request_time", *(f"{GROUP.name}_{name}" for name in names)]
        )
        users, times, ends, lengths = (_numbers(column) for column in table.columns)
        # Of several days, put together by user as a clustered table would be.
        buckets = np.concatenate(
            [pointers.users_of_bucket(bucket).to_numpy() for bucket in range(pointers.num_buckets)]
        )
        place = np.empty(int(buckets.max()) + 1, np.int64)
        place[buckets] = np.arange(len(buckets))
        order = np.lexsort((times, place[users]))
        users, times, ends, lengths = (v[order] for v in (users, times, ends, lengths))
        histories = snapshot.read(pa.array(buckets))
        starts = histories.offsets[place[users]] + ends - lengths
        return cls(users, times, starts, lengths, {n: histories.columns[n] for n in TRAITS})

    def __len__(self) -> int:
        return len(self.starts)

    def first(self, num: int) -> Examples:
        """The first so many examples."""
        part = slice(num)
        return Examples(
            self.user_ids[part],
            self.times[part],
            self.starts[part],
            self.lengths[part],
            self.columns,
        )

    @property
    def by_time(self) -> I64:
        return np.argsort(self.times, kind="stable")

    def rows(self, order: I64 | None = None, at_once: int = BATCH) -> Iterator[pa.Table]:
        """Fat rows in some order, that of users if None, some at a time."""
        order = np.arange(len(self)) if order is None else order
        for at in range(0, len(order), at_once):
            rows = order[at : at + at_once]
            starts, lengths = self.starts[rows], self.lengths[rows]
            offsets = pa.array(np.append(0, np.cumsum(lengths)).astype(np.int32))
            columns: dict[str, Any] = {
                "user_id": self.user_ids[rows],
                "request_time": pa.array(self.times[rows], pa.timestamp("us", "UTC")),
            }
            for name, values in self.columns.items():
                columns[name] = pa.ListArray.from_arrays(offsets, gather(values, starts, lengths))
            yield pa.table(columns)


def _numbers(column: pa.ChunkedArray) -> I64:
    whole = column.combine_chunks()
    if pa.types.is_timestamp(whole.type):
        whole = whole.cast(pa.int64())
    return np.asarray(whole.to_numpy(zero_copy_only=False), np.int64)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
