"""What is sealed, read from the log: right at every version, whatever became of the log."""

from __future__ import annotations

import random
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    at,
    day,
    event_table,
    few,
    history_of,
    many_events,
    seal_days,
)

from vlm_dagster import FeatureGroup, HistoryStore
from vlm_dagster.errors import WatermarkError
from vlm_dagster.sealed.log import LogReader
from vlm_dagster.storage import open_storage

EVENTS = many_events(seed=0, num_events=60, num_users=5)
GROUP = FeatureGroup("ratings")
EMPTY = pa.table(
    {f.name: pa.array([], f.type) for f in GROUP.event_schema if f.name != "available_at"}
)


@pytest.fixture(scope="module")
def long_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 windows, sealed in a shuffled order; deltalake makes a checkpoint every 100 versions."""
    uri = tmp_path_factory.mktemp("long")
    store = HistoryStore.create(uri, GROUP, 1, start=day(0))
    numbers = list(range(120))
    random.Random(0).shuffle(numbers)
    for number in numbers:
        store.seal(day(number), EMPTY)
    assert list((uri / "_delta_log").glob("*.checkpoint*.parquet"))
    return uri


def test_our_reader_agrees_with_deltalake_at_every_version(long_table: Path) -> None:
    one_reader = LogReader(open_storage(str(long_table)))
    newest = DeltaTable(str(long_table)).version()
    ids = sorted(one_reader.transactions(newest))
    assert len(ids) == 240  # a lock and its facts, per window
    some = random.Random(1).sample(ids, 12)
    for version in [*range(0, newest + 1, 11), 98, 99, 100, newest]:
        table = DeltaTable(str(long_table), version=version)
        expected = {i: v for i in some if (v := table.transaction_version(i)) is not None}
        fresh = LogReader(open_storage(str(long_table))).transactions(version)
        assert {i: fresh[i] for i in some if i in fresh} == expected
        assert one_reader.transactions(version) == fresh  # forwards and backwards


def test_transactions_are_read_in_any_order_of_versions(long_table: Path) -> None:
    reader = LogReader(open_storage(str(long_table)))
    versions = list(range(0, 121, 10))
    random.Random(2).shuffle(versions)
    for version in versions:
        assert len(reader.transactions(version)) == 2 * version


def test_a_version_beyond_the_newest_is_not_found(long_table: Path) -> None:
    with pytest.raises(FileNotFoundError):
        LogReader(open_storage(str(long_table))).transactions(121)


def test_the_watermark_follows_the_first_gap_at_every_version(long_table: Path) -> None:
    store = HistoryStore.open(long_table)
    numbers = list(range(120))
    random.Random(0).shuffle(numbers)
    for version in (0, 1, 7, 60, 99, 100, 101, 119, 120):
        sealed = set(numbers[:version])
        first_gap = min(set(range(121)) - sealed)
        snapshot = store.snapshot(version)
        assert snapshot.watermark_us == at(first_gap)
        assert [w.window.key for w in snapshot.windows] == [day(n) for n in range(first_gap)]


def test_covering_versions_are_found_one_by_one_and_all_at_once(long_table: Path) -> None:
    store = HistoryStore.open(long_table)
    numbers = list(range(120))
    random.Random(0).shuffle(numbers)
    sealed_in = {number: version for version, number in enumerate(numbers, 1)}
    keys = [day(number) for number in range(120)]
    expected = {day(n): max(sealed_in[m] for m in range(n + 1)) for n in range(120)}
    assert store.versions_covering(keys) == expected
    for number in (0, 1, 50, 119):
        assert store.version_covering(day(number)) == expected[day(number)]
        assert store.version_sealing(day(number)) == sealed_in[number]


@few(6)
@given(st.permutations(range(5)))
def test_covering_versions_never_change_as_more_is_sealed(order: list[int]) -> None:
    with TemporaryDirectory() as folder:
        store = HistoryStore.create(folder, GROUP, 1, start=day(0))
        known: dict[str, int] = {}
        sealed: set[int] = set()
        for version, number in enumerate(order, 1):
            store.seal(day(number), EMPTY)
            sealed.add(number)
            for other in range(5):
                if set(range(other + 1)) <= sealed:
                    covering = store.version_covering(day(other))
                    assert known.setdefault(day(other), covering) == covering <= version
                else:
                    with pytest.raises(WatermarkError, match="not sealed yet"):
                        store.version_covering(day(other))


def test_what_lacks_is_named(tmp_path: Path) -> None:
    store = history_of(tmp_path, EVENTS, days=[0, 2])
    with pytest.raises(WatermarkError, match=day(1)) as caught:
        store.version_covering(day(3))
    assert day(3) in str(caught.value)
    assert day(2) not in str(caught.value).split("sealed yet")[1]
    with pytest.raises(WatermarkError, match=day(1)):
        store.versions_covering([day(0), day(2)])


def test_windows_sealed_past_a_gap_are_listed_but_not_shown(tmp_path: Path) -> None:
    store = history_of(tmp_path, EVENTS, days=[0, 3])
    assert [s.window.key for s in store.sealed_windows()] == [day(0), day(3)]
    assert [s.window.key for s in store.snapshot().windows] == [day(0)]


def test_without_a_declared_start_the_first_window_sealed_is_the_first(tmp_path: Path) -> None:
    store = HistoryStore.create(tmp_path, GROUP, 1)
    assert store.snapshot().watermark_us is None
    assert store.snapshot().windows == []
    store.seal(day(5), EMPTY)
    assert store.snapshot().watermark_us == at(6)
    assert HistoryStore.open(tmp_path).snapshot(0).watermark_us is None
    store.seal(day(7), EMPTY)
    assert store.snapshot().watermark_us == at(6)


def test_a_handle_from_before_sees_what_others_sealed_since(tmp_path: Path) -> None:
    early = history_of(tmp_path, EVENTS, days=[0])
    seal_days(HistoryStore.open(tmp_path), EVENTS, [1, 2])
    assert early.snapshot().watermark_us == at(3)


# -- after the log was cleaned --------------------------------------------------------------------


def cleaned(uri: Path, version: int) -> None:
    """Checkpoint the log and remove every commit before it, as an eager operator would."""
    table = DeltaTable(str(uri))
    table.create_checkpoint()
    for commit in (uri / "_delta_log").glob("*.json"):
        if int(commit.stem) < version:
            commit.unlink()
    for checkpoint in (uri / "_delta_log").glob("*.checkpoint*.parquet"):
        if int(checkpoint.name[:20]) < version:
            checkpoint.unlink()


def test_what_is_sealed_survives_checkpoints_and_cleanups(tmp_path: Path) -> None:
    store = history_of(tmp_path, EVENTS)
    ref = store.snapshot().ref()
    store.snapshot(1)  # the reader remembers a version whose next commits will be gone
    fresh = HistoryStore.open(tmp_path)
    fresh.snapshot(1)
    cleaned(tmp_path, 4)
    table = DeltaTable(str(tmp_path))
    table.cleanup_metadata()
    for opened in (store, fresh, HistoryStore.open(tmp_path)):
        assert opened.snapshot().ref() == ref
        assert opened.seal(
            day(0), event_table([e for e in EVENTS if e["available_at"] < at(1)], opened.group)
        ).reused
        assert opened.version_covering(day(3)) == 4
        assert opened.snapshot().verify(deep=True).ok
        assert opened.sweep(older_than_s=0, dry_run=False) == []
    seal_days(store, [], [4, 5])
    assert fresh.snapshot().watermark_us == at(6)
    assert fresh.version_covering(day(5)) == 6
    assert fresh.versions_covering([day(4), day(5)]) == {day(4): 5, day(5): 6}


def test_sweeping_knows_the_files_that_only_a_checkpoint_names(tmp_path: Path) -> None:
    store = history_of(tmp_path, EVENTS)
    cleaned(tmp_path, 4)
    assert store.sweep(older_than_s=0, dry_run=False) == []
    assert store.snapshot().verify(deep=True).ok
