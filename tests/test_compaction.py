"""Compaction changes where rows lie, never what is read; killed or raced, it loses nothing."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import histories
from strategies import day, event_table, events_of_day, files_below, history_of, many_events

from vlm_dagster import HistoryStore, PointerDataset, Projection
from vlm_dagster.errors import CorruptFileError, SchemaError, StorageError
from vlm_dagster.hashing import Digest
from vlm_dagster.history.compaction import plan_merges
from vlm_dagster.sealed.layout import commit_layout
from vlm_dagster.sealed.log import SealedWindow, TableState
from vlm_dagster.sealed.segments import Segment
from vlm_dagster.windows import WindowGrid

NUM_DAYS = 11
EVENTS = many_events(seed=3, num_events=2_000, num_users=30, num_days=NUM_DAYS)
USERS = list(range(31))
# One day without events lies inside a block.
EVENTS = [e for e in EVENTS if e not in events_of_day(EVENTS, 5)]


@pytest.fixture
def store(tmp_path: Path) -> HistoryStore:
    return history_of(tmp_path / "history", EVENTS, days=range(NUM_DAYS))


def contents(store: HistoryStore, version: int | None = None) -> dict[str, object]:
    snapshot = HistoryStore.open(store.uri).snapshot(version)
    columns = [*(t.name for t in store.group.traits), "event_id", "event_time", "available_at"]
    found = {}
    for length in (None, 1, 4, 30):
        read = snapshot.read(USERS, Projection(columns, length))
        found[str(length)] = (read.columns, read.offsets.tolist(), read.end_positions.tolist())
    return {**found, "digest": snapshot.digest, "users": snapshot.user_ids()}


def test_what_is_read_is_the_same_and_is_the_reference(store: HistoryStore) -> None:
    before = contents(store)
    report = store.compact(fanout=2)
    assert report.segments_before == NUM_DAYS - 1
    assert report.segments_after == 3 == len(store.snapshot().segments)  # 8 + 2 + 1 days
    assert [s.num_windows for s in store.snapshot().segments] == [8, 2, 1]
    assert contents(store) == before
    truth = histories(EVENTS)
    read = store.snapshot().read(USERS, Projection(["event_id"]))
    for row, user in enumerate(USERS):
        ids = [event["event_id"] for event in truth.get(user, [])]
        assert read.of(row)["event_id"].to_pylist() == ids
    assert store.snapshot().verify(deep=True).ok


def test_every_version_from_before_replays_the_same(store: HistoryStore) -> None:
    versions = range(store.snapshot().version + 1)
    before = {version: contents(store, version) for version in versions}
    store.compact(fanout=2, max_windows=2)
    store.compact(fanout=2)
    assert {version: contents(store, version) for version in versions} == before


def test_other_readers_see_the_same_rows(store: HistoryStore) -> None:
    def rows() -> Counter:
        found = pl.scan_delta(store.uri).drop("segment").collect()
        return Counter(found.rows())

    before = rows()
    store.compact(fanout=4)
    assert rows() == before
    assert before.total() == len(EVENTS)


def test_compacting_again_does_nothing(store: HistoryStore) -> None:
    first = store.compact(fanout=3)
    again = store.compact(fanout=3)
    assert first.merges
    assert not again.merges
    assert again.version == first.version


def test_a_dry_run_writes_nothing_and_says_what_would_be(store: HistoryStore) -> None:
    before = files_below(store.uri)
    planned = store.compact(fanout=2, dry_run=True)
    assert files_below(store.uri) == before
    done = store.compact(fanout=2)
    assert planned.merges == done.merges
    assert planned.segments_after == done.segments_after
    assert planned.num_events_rewritten == done.num_events_rewritten


def test_pointers_built_before_and_after_are_equal(store: HistoryStore, tmp_path: Path) -> None:
    def pointers(name: str) -> pa.Table:
        dataset = PointerDataset.create(tmp_path / name, ["ratings"], num_buckets=2)
        for number in range(NUM_DAYS):
            wanted = [
                {"user_id": e["user_id"], "event_id": e["event_id"]}
                for e in events_of_day(EVENTS, number)
            ]
            if wanted:
                dataset.seal(
                    day(number), pa.Table.from_pylist(wanted), {"ratings": store.snapshot()}
                )
        return dataset.snapshot().to_table()

    before = pointers("before")
    store.compact(fanout=4)
    assert pointers("after") == before


def test_windows_past_a_gap_wait(tmp_path: Path) -> None:
    days = [n for n in range(NUM_DAYS) if n != 4]
    store = history_of(tmp_path / "h", EVENTS, days=days)
    store.compact(fanout=2)
    assert [s.num_windows for s in store.snapshot().segments] == [4]
    store.seal(day(4), event_table(events_of_day(EVENTS, 4), store.group))
    store.compact(fanout=2)
    assert [s.num_windows for s in store.snapshot().segments] == [8, 2, 1]
    assert store.snapshot().verify(deep=True).ok


def test_a_damaged_file_is_never_compacted_away(store: HistoryStore) -> None:
    path = Path(store.uri, store.snapshot().files()["path"][0].as_py())
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 0xFF
    path.write_bytes(raw)
    version = store.snapshot().version
    with pytest.raises(CorruptFileError, match="segment="):
        HistoryStore.open(store.uri).compact(fanout=2)
    assert store.snapshot().version == version


@pytest.mark.parametrize("options", [{"fanout": 1}, {"fanout": True}, {"max_windows": 0}])
def test_options_that_make_no_sense_are_refused(store: HistoryStore, options: dict) -> None:
    with pytest.raises(SchemaError, match="2 or more"):
        store.compact(**options)


# -- tiers ----------------------------------------------------------------------------------------


@given(st.integers(2, 9), st.lists(st.integers(1, 12), min_size=1, max_size=40))
def test_an_event_is_rewritten_at_most_once_a_tier(fanout: int, steps: list[int]) -> None:
    """However many windows come between two compactions."""
    grid = WindowGrid("daily")
    sealed: dict[int, SealedWindow] = {}
    segments: list[Segment] = []
    rewritten: Counter[int] = Counter()
    for step in steps:
        for index in range(100 + len(sealed), 100 + len(sealed) + step):
            sealed[index] = SealedWindow(grid.at(index), str(Digest(1)), 1)
            segments.append(Segment(index, index, grid.at(index).segment))
        state = TableState(0, grid, 100, sealed)
        merges = plan_merges(state, sorted(segments), fanout=fanout, max_windows=10**6)
        for merge in merges:
            low, high = merge.first.index, merge.last.index
            assert [i for s in merge.segments for i in range(s.first, s.last + 1)] == list(
                range(low, high + 1)
            )
            segments = [s for s in segments if s not in merge.segments]
            segments.append(Segment(low, high, "x"))
            rewritten.update(range(low, high + 1))
    num = len(sealed)
    tiers = 0
    while fanout ** (tiers + 1) <= num:
        tiers += 1
    assert max(rewritten.values(), default=0) <= tiers
    assert len(segments) <= (tiers + 1) * (fanout - 1) + 1
    assert sorted(i for s in segments for i in range(s.first, s.last + 1)) == sorted(sealed)


# -- races ----------------------------------------------------------------------------------------


def compact_in_process(uri: str, fanout: int, barrier: object, results: object) -> None:
    barrier.wait()
    report = HistoryStore.open(uri).compact(fanout=fanout)
    results.put(("compact", len(report.merges), report.num_lost))


def seal_in_process(uri: str, numbers: list[int], barrier: object, results: object) -> None:
    store = HistoryStore.open(uri)
    barrier.wait()
    for number in numbers:
        store.seal(day(number), event_table(events_of_day(EVENTS, number), store.group))
    results.put(("seal", len(numbers), 0))


def test_compactors_and_a_sealer_race(tmp_path: Path) -> None:
    store = history_of(tmp_path / "h", EVENTS, days=range(8))
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(4), context.Queue()
    work = [
        *((compact_in_process, (store.uri, fanout, barrier, results)) for fanout in (2, 2, 4)),
        (seal_in_process, (store.uri, [8, 9, 10], barrier, results)),
    ]
    processes = [context.Process(target=f, args=args) for f, args in work]
    for process in processes:
        process.start()
    done = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sum(num for what, num, _ in done if what == "compact") >= 1
    after = HistoryStore.open(store.uri)
    assert after.snapshot().num_events == len(EVENTS)
    assert after.snapshot().verify(deep=True).ok
    whole = history_of(tmp_path / "whole", EVENTS, days=range(NUM_DAYS))
    assert contents(after) == contents(whole)


def test_of_two_rewrites_of_the_same_files_one_is_refused(
    store: HistoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both looked before either committed: without the lock, Delta would let both through."""
    from vlm_dagster.history.rewrite import rewrite
    from vlm_dagster.sealed.layout import StagedLayout

    one, other = HistoryStore.open(store.uri), HistoryStore.open(store.uri)
    version = one.snapshot().version
    segments = one.snapshot().segments[:2]
    windows = [one.grid.parse(day(0)), one.grid.parse(day(1))]
    written = [rewrite(s._table, version, segments, windows) for s in (one, other)]
    staged = [StagedLayout("compaction", "x", w.added, w.replaced) for w in written]
    handles = [other._table.handle()]  # opened before the first commit
    lent_now = other._table.newest.lent
    monkeypatch.setattr(
        other._table.newest,
        "lent",
        lambda: contextlib.nullcontext(handles.pop()) if handles else lent_now(),
    )
    assert commit_layout(one._table, staged[0]) == version + 1
    assert commit_layout(other._table, staged[1]) is None
    assert not handles
    assert HistoryStore.open(store.uri).snapshot().verify(deep=True).ok


# -- crashes --------------------------------------------------------------------------------------

CHILD = """
import os, sys, time
from vlm_dagster import HistoryStore
from vlm_dagster.history import compaction, rewrite
from vlm_dagster.storage import LocalStorage
uri, stop = sys.argv[1:]
def stop_at(owner, name, before=True):
    original = getattr(owner, name)
    def stopping(*args, **kwargs):
        found = None if before else original(*args, **kwargs)
        os.write(1, b"stopped\\n")
        time.sleep(600)
        return found
    setattr(owner, name, stopping)
stop_at(*{
    "before writing": (rewrite, "_write"),
    "before the first file is in place": (LocalStorage, "put"),
    "after the first file is in place": (LocalStorage, "put", False),
    "before the proof": (rewrite, "_read_back"),
    "before the commit": (compaction, "commit_layout"),
    "after the first commit": (compaction, "commit_layout", False),
}[stop])
HistoryStore.open(uri).compact(fanout=2)
"""
STOPS = [
    "before writing",
    "before the first file is in place",
    "after the first file is in place",
    "before the proof",
    "before the commit",
    "after the first commit",
]


@pytest.mark.parametrize("stop", STOPS)
def test_killed_anywhere_nothing_is_lost(store: HistoryStore, stop: str) -> None:
    before = contents(store)
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, store.uri, stop],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "stopped\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert contents(store) == before
    assert HistoryStore.open(store.uri).snapshot().verify(deep=True).ok
    report = HistoryStore.open(store.uri).compact(fanout=2)
    assert report.segments_after == 3
    assert contents(store) == before
    store.sweep(older_than_s=0, dry_run=False)
    assert HistoryStore.open(store.uri).snapshot().verify(deep=True).ok
    assert not any(path.startswith("_staging/") for path in files_below(store.uri))


@pytest.mark.parametrize("fail_at", range(4))
def test_storage_that_fails_leaves_everything_as_it_was(
    store: HistoryStore, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    from vlm_dagster.storage import LocalStorage

    before, version = contents(store), store.snapshot().version
    put, calls = LocalStorage.put, [0]

    def failing(self: LocalStorage, local: Path, path: str) -> None:
        calls[0] += 1
        if calls[0] == fail_at + 1:
            raise StorageError(self.uri, f"writing {path}", OSError(28, "No space left on device"))
        put(self, local, path)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "put", failing)
        with pytest.raises(StorageError, match="No space left"):
            HistoryStore.open(store.uri).compact(fanout=2)
    # What was merged before the failure stays; nothing else changed.
    assert store.snapshot().version <= version + 2
    assert contents(store) == before
    HistoryStore.open(store.uri).compact(fanout=2)
    assert contents(store) == before
