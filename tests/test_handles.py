"""The Delta handle that a table keeps: as good as one opened anew, whatever became of the log."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from strategies import day, event_table, events_of_day, group_of, history_of, many_events, seal_days

from vlm_dagster import HistoryStore, Sealed
from vlm_dagster.errors import TableError, WindowSealedError
from vlm_dagster.sealed.log import LogReader
from vlm_dagster.storage import open_storage

EVENTS = many_events(seed=0, num_events=200, num_users=9)
GROUP = group_of(EVENTS)
DAYS = [event_table(events_of_day(EVENTS, number), GROUP) for number in range(4)]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows with every table that is opened from its log."""
    calls: list[object] = []
    original = DeltaTable.__init__

    def counting(self: DeltaTable, *args: object, **kwargs: object) -> None:
        calls.append(args)
        original(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(DeltaTable, "__init__", counting)
    return calls


def test_the_log_is_opened_once_to_open_a_store_and_seal(
    tmp_path: Path, opened: list[object]
) -> None:
    history_of(tmp_path, EVENTS, days=[0])
    opened.clear()
    store = HistoryStore.open(tmp_path)
    for number in (1, 2, 3):
        assert store.seal(day(number), DAYS[number]).version == number + 1
        assert store.snapshot().version == number + 1
    assert len(opened) == 1


def test_what_others_committed_is_seen(tmp_path: Path) -> None:
    store = history_of(tmp_path, EVENTS, days=[0])
    other = HistoryStore.open(tmp_path)
    for number in (1, 2, 3):
        assert other.seal(day(number), DAYS[number]).version == number + 1
        assert store.seal(day(number), DAYS[number]).reused
        store, other = other, store
    with pytest.raises(WindowSealedError):
        store.seal(day(3), DAYS[3].slice(1))


def test_a_handle_is_lent_to_one_at_a_time(tmp_path: Path) -> None:
    table = history_of(tmp_path, EVENTS, days=[0])._table
    with table.newest.lent() as one:
        HistoryStore.open(tmp_path).seal(day(1), DAYS[1])
        with table.newest.lent() as two:
            assert (one.version(), two.version()) == (1, 2)
        assert one.version() == 1  # what is decided from it stays true of it
    with table.newest.lent() as three:
        assert three.version() == 2


def test_threads_that_share_a_store_seal_every_window_once(tmp_path: Path) -> None:
    store = HistoryStore.create(tmp_path, GROUP, 2, start=day(0))
    jobs = [(number, DAYS[number]) for number in range(4)] * 4
    with ThreadPoolExecutor(8) as pool:
        sealed: list[Sealed] = list(pool.map(lambda job: store.seal(day(job[0]), job[1]), jobs))
    assert sorted(one.reused for one in sealed) == [False] * 4 + [True] * 12
    assert DeltaTable(str(tmp_path)).version() == 4
    assert store.snapshot().verify(deep=True).problems == ()


def test_another_table_at_the_same_place_is_noticed(tmp_path: Path) -> None:
    store = history_of(tmp_path / "history", EVENTS, days=[0, 1])
    shutil.rmtree(tmp_path / "history")
    other = history_of(tmp_path / "history", EVENTS, days=[0])
    for _ in range(2):
        with pytest.raises(TableError, match="another table lies here now"):
            store.seal(day(2), DAYS[2])
    seal_days(other, EVENTS, [1, 2])
    with pytest.raises(TableError, match="another table lies here now"):
        store.snapshot()
    assert other.snapshot().version == 3


def test_a_table_that_is_gone_is_noticed(tmp_path: Path) -> None:
    store = history_of(tmp_path / "history", EVENTS, days=[0, 1])
    shutil.rmtree(tmp_path / "history")
    with pytest.raises(TableError, match="there is no Delta table here"):
        store.snapshot()


def test_a_log_that_was_cleaned_behind_a_kept_handle_is_opened_anew(tmp_path: Path) -> None:
    store = history_of(tmp_path, EVENTS, days=[0])
    seal_days(HistoryStore.open(tmp_path), EVENTS, [1, 2])
    DeltaTable(str(tmp_path)).create_checkpoint()
    for version in (0, 1, 2):
        (tmp_path / "_delta_log" / f"{version:020d}.json").unlink()
    assert store.snapshot().version == 3
    assert store.seal(day(3), DAYS[3]).version == 4


# -- checkpoints ----------------------------------------------------------------------------------


def sealed_empty(uri: Path, num: int) -> HistoryStore:
    store = HistoryStore.create(uri, GROUP, 1, start=day(0))
    empty = pa.table({f.name: pa.array([], f.type) for f in DAYS[0].schema})
    for number in range(num):
        store.seal(day(number), empty)
    return store


def test_the_log_is_checkpointed_so_that_opening_stays_cheap(tmp_path: Path) -> None:
    sealed_empty(tmp_path, 25)
    found = sorted(p.name[:20] for p in (tmp_path / "_delta_log").glob("*.checkpoint.parquet"))
    assert [int(number) for number in found] == [9, 19]


def test_a_checkpoint_that_fails_does_not_undo_the_commit_before_it(tmp_path: Path) -> None:
    store = sealed_empty(tmp_path, 8)
    blocked = tmp_path / "_delta_log" / f"{9:020d}.checkpoint.parquet"
    blocked.mkdir()  # nothing can be written under this name
    sealed = store.seal(day(8), DAYS[0].slice(0, 0))
    assert (sealed.version, sealed.reused) == (9, False)
    assert store.snapshot().version == 9
    assert HistoryStore.open(tmp_path).snapshot().version == 9


def test_a_missing_or_misleading_hint_at_the_checkpoint_changes_nothing(tmp_path: Path) -> None:
    sealed_empty(tmp_path, 25)
    expected = LogReader(open_storage(str(tmp_path))).transactions(25)
    assert len(expected) == 50
    hint = tmp_path / "_delta_log" / "_last_checkpoint"
    good = hint.read_text()
    bad = ["", "[]", "{}", '{"version": "x"}', '{"version": 17}', '{"version": 99}', "\x00",
           '{"version": 9}', '{"version": 19, "parts": 2}', good]  # fmt: skip
    for text in bad:
        hint.write_text(text)
        assert LogReader(open_storage(str(tmp_path))).transactions(25) == expected
    # A cleanup took what the older checkpoint would need replayed.
    hint.write_text('{"version": 9}')
    for version in range(15):
        (tmp_path / "_delta_log" / f"{version:020d}.json").unlink()
    assert LogReader(open_storage(str(tmp_path))).transactions(25) == expected
    hint.unlink()
    assert LogReader(open_storage(str(tmp_path))).transactions(25) == expected
    assert len(LogReader(open_storage(str(tmp_path))).transactions(19)) == 38
