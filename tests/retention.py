"""Tables with versions to let go of, for the tests of retention."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
from strategies import day, events_of_day, files_below, history_of, many_events

from vlm_dagster import HistoryStore, PointerDataset, Projection, Snapshot

NUM_DAYS = 8
EVENTS = many_events(seed=5, num_events=800, num_users=12, num_days=NUM_DAYS)
USERS = list(range(13))


def compacted(uri: Path, num_days: int = NUM_DAYS) -> HistoryStore:
    """A history in three layouts: by day, by two days, by eight."""
    store = history_of(uri, EVENTS, days=range(num_days))
    store.compact(fanout=2, max_windows=2)
    store.compact(fanout=2)
    return store


def content(snapshot: Snapshot) -> tuple[object, ...]:
    """All that can be read of a snapshot, read anew."""
    columns = [*(t.name for t in snapshot.group.traits), "event_id", "event_time", "available_at"]
    read = snapshot.read(USERS, Projection(columns))
    return read.columns, read.offsets.tolist(), read.end_positions.tolist(), snapshot.digest


def at_version(store: HistoryStore, version: int) -> tuple[object, ...]:
    return content(HistoryStore.open(store.uri).snapshot(version))


def pointers_on(store: HistoryStore, uri: Path, days: Iterable[int]) -> PointerDataset:
    """A pointer dataset, every window of which pins the first version that covers it."""
    dataset = PointerDataset.create(os.fspath(uri), [store.group.name], num_buckets=2)
    for number in days:
        snapshot = store.snapshot(store.version_covering(day(number)))
        dataset.seal(day(number), requests_of(number), {store.group.name: snapshot})
    return dataset


def requests_of(number: int) -> pa.Table:
    """A request for every event of a day."""
    events = events_of_day(EVENTS, number)
    return pa.table(
        {name: pa.array([e[name] for e in events], pa.int64()) for name in ("user_id", "event_id")}
    )


def data_files(uri: str | Path) -> set[str]:
    return {path for path in files_below(uri) if path.startswith("segment=")}


def named_by(uri: str, versions: Iterable[int]) -> set[str]:
    """The files of these versions, as another reader of Delta finds them."""
    from deltalake import DeltaTable

    found: set[str] = set()
    for version in versions:
        table = DeltaTable(uri, version=version)
        found |= set(pa.table(table.get_add_actions(flatten=True))["path"].to_pylist())
    return found
