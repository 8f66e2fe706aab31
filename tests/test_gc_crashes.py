"""A collection that is killed anywhere, or refused by storage, or raced, loses nothing that is held."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from retention import (
    EVENTS,
    NUM_DAYS,
    at_version,
    compacted,
    content,
    data_files,
    named_by,
    pointers_on,
    requests_of,
)
from strategies import day, event_table, events_of_day, files_below, history_of

from vlm_dagster import HistoryStore, PointerDataset
from vlm_dagster.errors import RetiredVersionError, StorageError
from vlm_dagster.storage import LocalStorage

# Files of the store below that nothing holds.
NUM_GONE = 20

CHILD = """
import os, sys, time
from deltalake import DeltaTable
from vlm_dagster import HistoryStore
from vlm_dagster.retention import collect
from vlm_dagster.sealed import retired
from vlm_dagster.storage import LocalStorage
uri, stop = sys.argv[1:]
def stop_at(owner, name, number=1, before=True):
    original = getattr(owner, name)
    calls = []
    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) < number:
            return original(*args, **kwargs)
        found = None if before else original(*args, **kwargs)
        os.write(1, b"stopped\\n")
        time.sleep(600)
        return found
    setattr(owner, name, stopping)
stop_at(*{
    "before it is recorded what is retired": (retired, "put_sidecar"),
    "before the versions are retired": (DeltaTable, "create_write_transaction"),
    "after the versions are retired": (collect, "retire", 1, False),
    "before the first file is deleted": (LocalStorage, "delete"),
    "after the first file is deleted": (LocalStorage, "delete", 1, False),
    "in the middle": (LocalStorage, "delete", 7),
    "before the last file is deleted": (LocalStorage, "delete", 20),
    "after everything": (collect, "purge", 1, False),
}[stop])
HistoryStore.open(uri).gc(keep_hours=0, dry_run=False)
"""
STOPS = [
    "before it is recorded what is retired",
    "before the versions are retired",
    "after the versions are retired",
    "before the first file is deleted",
    "after the first file is deleted",
    "in the middle",
    "before the last file is deleted",
    "after everything",
]


@pytest.fixture
def store(tmp_path: Path) -> HistoryStore:
    store = compacted(tmp_path / "history")
    store.pin("kept", 2)
    return store


@pytest.mark.parametrize("stop", STOPS)
def test_killed_anywhere_the_next_one_finishes(
    store: HistoryStore, tmp_path: Path, stop: str
) -> None:
    newest = store.snapshot().version
    before = at_version(store, 2), at_version(store, newest)
    moved = store.ref(5), at_version(store, 5)
    planned = store.gc(keep_hours=0)
    assert planned.purged.num_files == NUM_GONE
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, store.uri, stop], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "stopped\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert (at_version(store, 2), at_version(store, newest)) == before
    assert content(moved[0].open()) == moved[1]  # it was retired, or it is still whole
    store.gc(keep_hours=0, dry_run=False)
    assert (at_version(store, 2), at_version(store, newest)) == before
    assert content(moved[0].open()) == moved[1]
    assert data_files(store.uri) == named_by(store.uri, [2, newest])
    assert HistoryStore.open(store.uri).snapshot().verify(deep=True).ok


@pytest.mark.parametrize("fail_at", range(0, NUM_GONE, 3))
def test_storage_that_refuses_to_delete(
    store: HistoryStore, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    newest = store.snapshot().version
    before, files = (at_version(store, 2), at_version(store, newest)), data_files(store.uri)
    delete, calls = LocalStorage.delete, [0]

    def failing(self: LocalStorage, path: str) -> None:
        calls[0] += 1
        if calls[0] == fail_at + 1:
            raise PermissionError(13, "Permission denied")
        delete(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "delete", failing)
        with pytest.raises(StorageError, match=r"deleting segment=.*Permission denied"):
            HistoryStore.open(store.uri).gc(keep_hours=0, dry_run=False)
    assert len(files) - len(data_files(store.uri)) == fail_at
    assert (at_version(store, 2), at_version(store, newest)) == before
    store.gc(keep_hours=0, dry_run=False)
    assert data_files(store.uri) == named_by(store.uri, [2, newest])
    assert (at_version(store, 2), at_version(store, newest)) == before


def test_a_commit_that_fails_lets_nothing_go(
    store: HistoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = data_files(store.uri)

    def failing(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("deltalake.DeltaTable.create_write_transaction", failing)
        with pytest.raises(StorageError, match=r"retiring versions.*No space left"):
            store.gc(keep_hours=0, dry_run=False)
    assert data_files(store.uri) == before
    assert store.gc(keep_hours=0, dry_run=False).purged.num_files == NUM_GONE


# -- races ----------------------------------------------------------------------------------------


def collect_in_process(uri: str, barrier: object, done: object, results: object) -> None:
    barrier.wait()
    num = 0
    while not done.is_set():
        store = HistoryStore.open(uri)
        num += store.gc(keep_hours=0, move_pins=True, dry_run=False).purged.num_files
    results.put(("collected", num))


def seal_in_process(uri: str, barrier: object, done: object, results: object) -> None:
    store = HistoryStore.open(uri)
    barrier.wait()
    for number in range(1, NUM_DAYS):
        store.seal(day(number), event_table(events_of_day(EVENTS, number), store.group))
    results.put(("sealed", NUM_DAYS - 1))


def compact_in_process(uri: str, barrier: object, done: object, results: object) -> None:
    barrier.wait()
    merged = 0
    while merged < 5:
        store = HistoryStore.open(uri)
        merged += len(store.compact(fanout=2).merges)
        if len(store.sealed_windows()) == NUM_DAYS and len(store.snapshot().segments) == 1:
            break
    results.put(("merged", merged))


def point_in_process(uri: str, to: str, barrier: object, done: object, results: object) -> None:
    dataset = PointerDataset.create(to, ["ratings"], num_buckets=2)
    barrier.wait()
    again, number = 0, 0
    while number < NUM_DAYS:
        store = HistoryStore.open(uri)
        snapshot = store.snapshot()
        if snapshot.watermark_us is None or not snapshot.covers(
            store.grid.parse(day(number)).end_us
        ):
            continue
        try:
            dataset.seal(day(number), requests_of(number), {"ratings": snapshot})
        except RetiredVersionError:  # collected at once, as nothing is recent here
            again += 1
            continue
        number += 1
    done.set()
    results.put(("pointed", number))


def test_a_collector_a_sealer_a_compactor_and_a_builder_race(tmp_path: Path) -> None:
    store = history_of(tmp_path / "h", EVENTS, days=[0])
    to = str(tmp_path / "p")
    context = multiprocessing.get_context("spawn")
    barrier, results, done = context.Barrier(5), context.Queue(), context.Event()
    shared = (barrier, done, results)
    processes = [
        context.Process(target=collect_in_process, args=(store.uri, *shared)),
        context.Process(target=collect_in_process, args=(store.uri, *shared)),
        context.Process(target=seal_in_process, args=(store.uri, *shared)),
        context.Process(target=compact_in_process, args=(store.uri, *shared)),
        context.Process(target=point_in_process, args=(store.uri, to, *shared)),
    ]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=180) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sum(num for what, num in outcomes if what == "collected") > 0
    whole = history_of(tmp_path / "whole", EVENTS, days=range(NUM_DAYS))
    store = HistoryStore.open(store.uri)
    assert store.snapshot().verify(deep=True).ok
    assert content(store.snapshot()) == content(whole.snapshot())
    expected = pointers_on(whole, tmp_path / "q", range(NUM_DAYS))
    dataset = PointerDataset.open(to)
    assert dataset.snapshot().to_table() == expected.snapshot().to_table()
    for pin in dataset.ref().pins:
        covering = [v for v in range(1, NUM_DAYS + 1) if whole.snapshot(v).digest == pin.digest]
        assert content(pin.open()) == at_version(whole, covering[0])
    assert not [path for path in files_below(store.uri) if path.startswith("_staging/")]
