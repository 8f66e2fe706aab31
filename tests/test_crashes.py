"""Killed processes and full disks: nothing half-done is ever visible, and a rerun succeeds."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from strategies import (
    day,
    event_table,
    events_of_day,
    files_below,
    group_of,
    history_of,
    many_events,
)

from vlm_dagster import FeatureGroup, HistoryStore, Sealed
from vlm_dagster.engines.local import LocalEngine
from vlm_dagster.errors import CorruptFileError, StorageError
from vlm_dagster.sealed.sweep import DEFAULT_GRACE_S
from vlm_dagster.storage import LocalStorage

EVENTS = many_events(seed=0, num_events=3_000, num_users=50)
GROUP = group_of(EVENTS)
DAY_1 = event_table(events_of_day(EVENTS, 1), GROUP)

# A child says "ready" when all is imported, and where it is in its work.
CHILD = """
import os, sys
import pyarrow.parquet as pq
from vlm_dagster import HistoryStore
from vlm_dagster.storage import LocalStorage
import duckdb; duckdb.connect().close()
uri, key, events, stop = sys.argv[1:]
def stop_at(cls, name, before=True):
    original = getattr(cls, name)
    def stopping(*args, **kwargs):
        if not before:
            original(*args, **kwargs)
        print("stopped", flush=True)
        sys.stdin.read()
    setattr(cls, name, stopping)
if stop == "before the first file is in place":
    stop_at(LocalStorage, "put")
elif stop == "after the first file is in place":
    stop_at(LocalStorage, "put", before=False)
elif stop == "before the commit":
    stop_at(HistoryStore, "commit")
store = HistoryStore.open(uri)
print("ready", flush=True)
store.seal(key, events)
print("done", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def store(tmp_path: Path) -> HistoryStore:
    return history_of(tmp_path / "history", EVENTS, days=[0], num_buckets=8)


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    pq.write_table(DAY_1, tmp_path / "events.parquet")
    return tmp_path / "events.parquet"


def child(store: HistoryStore, parquet: Path, stop: str = "") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, store.uri, day(1), str(parquet), stop],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def data_files(store: HistoryStore) -> set[str]:
    return {path for path in files_below(store.uri) if path.startswith("segment=")}


def live_files(store: HistoryStore) -> set[str]:
    return set(store.snapshot().files()["path"].to_pylist())


def check_nothing_is_visible_and_a_rerun_succeeds(store: HistoryStore, before: set[str]) -> None:
    snapshot = store.snapshot()
    assert snapshot.version == 1
    assert live_files(store) == before
    assert snapshot.verify(deep=True).problems == ()
    sealed = store.seal(day(1), DAY_1)
    assert (sealed.version, sealed.num_events, sealed.reused) == (2, DAY_1.num_rows, False)
    check_sweeping_leaves_only_what_is_live(store)


def check_sweeping_leaves_only_what_is_live(store: HistoryStore) -> None:
    live = live_files(store)
    assert store.sweep(older_than_s=DEFAULT_GRACE_S, dry_run=False) == []
    orphans = {info.path for info in store.sweep(older_than_s=0)}
    assert orphans == (data_files(store) - live) | {
        p for p in files_below(store.uri) if p.startswith("_staging/")
    }
    assert {info.path for info in store.sweep(older_than_s=0, dry_run=False)} == orphans
    assert data_files(store) == live
    assert not any(path.startswith("_staging/") for path in files_below(store.uri))
    assert store.snapshot().verify(deep=True).problems == ()


# -- killed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "point",
    ["before the first file is in place", "after the first file is in place", "before the commit"],
)
def test_killed_at_a_known_point(store: HistoryStore, parquet: Path, point: str) -> None:
    before = live_files(store)
    process = child(store, parquet, point)
    assert process.stdout is not None
    assert process.stdout.readline() == "stopped\n"
    kill(process)
    in_place = len(data_files(store) - before)
    assert in_place == {"before the f": 0, "after the fi": 1, "before the c": 8}[point[:12]]
    check_nothing_is_visible_and_a_rerun_succeeds(store, before)


def test_killed_at_random_points(tmp_path: Path, parquet: Path) -> None:
    rng = random.Random(0)
    done = 0
    for attempt in range(8):
        store = history_of(tmp_path / f"history{attempt}", EVENTS, days=[0], num_buckets=8)
        before = live_files(store)
        process = child(store, parquet)
        time.sleep(rng.uniform(0, 0.12))
        kill(process)
        if store.snapshot().version == 2:
            done += 1  # it was through before the signal came
            assert store.seal(day(1), DAY_1).reused
            check_sweeping_leaves_only_what_is_live(store)
        else:
            check_nothing_is_visible_and_a_rerun_succeeds(store, before)
    assert done < 8


def test_a_commit_whose_files_were_swept_meanwhile_is_refused(store: HistoryStore) -> None:
    staged = store.stage(day(1), DAY_1)
    swept = store.sweep(older_than_s=0, dry_run=False)
    assert {info.path for info in swept} == {file.path for file in staged.files}
    with pytest.raises(CorruptFileError, match="is missing, so window"):
        store.commit(staged)
    assert store.snapshot().version == 1
    assert store.seal(day(1), DAY_1).version == 2


def test_a_dry_sweep_and_a_young_orphan_leave_everything(store: HistoryStore) -> None:
    store.stage(day(1), DAY_1)
    before = files_below(store.uri)
    assert len(store.sweep(older_than_s=0)) == 8
    assert store.sweep(older_than_s=60, dry_run=False) == []
    assert files_below(store.uri) == before


def test_sweeping_spares_files_that_only_an_older_version_shows(store: HistoryStore) -> None:
    old = store.snapshot()
    table = DeltaTable(store.uri)
    table.optimize.compact()  # another writer's rewrite: the old files leave the newest version
    removed = live_files(store) ^ set(old.files()["path"].to_pylist())
    store.sweep(older_than_s=0, dry_run=False)
    assert removed <= data_files(store) | live_files(store)
    assert old.verify(deep=True).problems == ()


def test_sweeping_leaves_strangers_files_alone(store: HistoryStore) -> None:
    (Path(store.uri) / "README").write_text("not ours")
    assert store.sweep(older_than_s=0, dry_run=False) == []
    assert (Path(store.uri) / "README").exists()


# -- full disks -----------------------------------------------------------------------------------

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fails_on_call(number: int, original, error: BaseException = NO_SPACE):  # type: ignore[no-untyped-def]
    calls = iter(range(1, 1_000_000))

    def failing(*args: object, **kwargs: object) -> object:
        if next(calls) >= number:
            raise error
        return original(*args, **kwargs)

    return failing


@pytest.mark.parametrize("number", [1, 5])
def test_a_disk_that_fills_up_while_a_file_is_written(
    store: HistoryStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before = files_below(store.uri)
    with monkeypatch.context() as patch:
        patch.setattr(
            pq.ParquetWriter, "write_table", fails_on_call(number, pq.ParquetWriter.write_table)
        )
        with pytest.raises(StorageError, match="No space left") as caught:
            store.seal(day(1), DAY_1)
    assert day(1) in str(caught.value)
    assert files_below(store.uri) == before
    assert store.seal(day(1), DAY_1).version == 2


@pytest.mark.parametrize("number", [1, 5])
def test_a_disk_that_fills_up_while_files_go_into_place(
    store: HistoryStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before = live_files(store)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails_on_call(2 * number - 1, os.fsync))
        with pytest.raises(StorageError, match="No space left"):
            store.seal(day(1), DAY_1)
    assert not any(path.startswith("_staging/") for path in files_below(store.uri))
    check_nothing_is_visible_and_a_rerun_succeeds(store, before)


def test_storage_that_refuses_to_put_is_a_storage_error(
    store: HistoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = StorageError(store.uri, "writing", OSError(errno.EDQUOT, "Disk quota exceeded"))
    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "put", fails_on_call(1, LocalStorage.put, refusal))
        with pytest.raises(StorageError, match="quota"):
            store.seal(day(1), DAY_1)
    assert store.seal(day(1), DAY_1).version == 2


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB that really fills up."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if mount is None or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    path = folder / "filler"
    stat = os.statvfs(folder)
    path.write_bytes(b"\0" * max(stat.f_bavail * stat.f_frsize - leave, 0))
    return path


def outcome_of_sealing(store: HistoryStore) -> Sealed | StorageError:
    try:
        return store.seal(day(1), DAY_1)
    except StorageError as error:
        return error


def test_a_disk_that_is_really_full(tiny_disk: Path) -> None:
    outcomes = []
    for leave in range(0, 200_000, 16_384):  # it fills up while sorting, writing, committing, never
        store = history_of(tiny_disk / "history", EVENTS[:300], days=[0], num_buckets=8)
        before = live_files(store)
        filler = fill(tiny_disk, leave)
        started = time.monotonic()
        outcome = outcome_of_sealing(store)
        assert time.monotonic() - started < 10
        filler.unlink()
        if isinstance(outcome, StorageError):
            assert re.search("o space left|os error 28", str(outcome)), outcome
            check_nothing_is_visible_and_a_rerun_succeeds(store, before)
        else:
            assert store.snapshot().verify(deep=True).problems == ()
        outcomes.append(isinstance(outcome, StorageError))
        shutil.rmtree(tiny_disk / "history")
    assert outcomes[0]
    assert not outcomes[-1]
    assert outcomes == sorted(outcomes, reverse=True)


def test_a_disk_too_small_to_spill_to(tiny_disk: Path) -> None:
    engine = LocalEngine(memory_limit="16MB", threads=1)
    group = FeatureGroup("ratings", GROUP.traits, availability="recorded")
    store = HistoryStore.create(tiny_disk / "history", group, 1, engine=engine)
    table = event_table(many_events(seed=1, num_events=2_000, num_users=9, num_days=1), group)
    batches = (
        table.set_column(1, "event_id", [list(range(n * 2_000, n * 2_000 + 2_000))])
        for n in range(300)
    )
    with pytest.raises(StorageError, match=r"storage failed while staging.*sorting failed"):
        store.seal(day(0), batches)
    assert store.snapshot().version == 0
    assert not list((tiny_disk / "history" / "_staging").glob("*"))


def test_a_table_that_cannot_be_written_to(tiny_disk: Path) -> None:
    store = history_of(tiny_disk / "history", EVENTS[:300], days=[0], num_buckets=2)
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    snapshot = store.snapshot()
    assert snapshot.verify(deep=True).ok
    with pytest.raises(StorageError, match="Read-only file system"):
        store.seal(day(1), DAY_1)
    with pytest.raises(StorageError):
        HistoryStore.create(tiny_disk / "other", GROUP)
    assert store.snapshot().version == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_to_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="ermission denied"):
            HistoryStore.create(tmp_path / "history", GROUP)
    finally:
        tmp_path.chmod(0o700)
