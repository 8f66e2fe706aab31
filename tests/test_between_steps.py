"""What somebody else does between two steps of an act, at the very place where it would hurt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from strategies import FIRST_DAY, TIME, at, day, event_table, group_of

from vlm_dagster import HistoryStore, PointerDataset, Projection
from vlm_dagster.errors import InvalidEventsError, PinError, WindowError
from vlm_dagster.history import compaction, correction, erasure
from vlm_dagster.sealed import commit, layout

GROUP = group_of()


def event(user: int, number: int, second: int) -> dict:
    when = at(number, second * 1_000_000)
    return {
        "user_id": user,
        "event_id": number * 1_000 + user * 100 + second,
        "event_time": when,
        "available_at": when,
        "item_id": 1,
        "rating": 1.0,
        "title": "",
        "liked": True,
    }


def table_of(*events: dict) -> pa.Table:
    return event_table(events, GROUP)


@pytest.fixture
def store(tmp_path: Path) -> HistoryStore:
    return HistoryStore.create(tmp_path / "h", GROUP, 2, start=FIRST_DAY, bands=(1, 2, 5))


def once(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, act: Callable[[], object]
) -> None:
    """Before the next call of a function, something else happens."""
    original = getattr(owner, name)

    def first(*args: object, **options: object) -> object:
        monkeypatch.setattr(owner, name, original)
        act()
        return original(*args, **options)

    monkeypatch.setattr(owner, name, first)


@pytest.mark.parametrize("first", ["compaction", "correction"])
def test_an_empty_window_is_corrected_while_it_is_compacted(
    store: HistoryStore, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """It has no files by which either would notice the other."""
    for number in range(4):
        store.seal(day(number), table_of(*[event(1, number, 1)] * (number != 1)))
    other = HistoryStore.open(store.uri)

    def correct(who: HistoryStore) -> object:
        return who.correct(day(1), table_of(event(1, 1, 1)), reason="late data")

    if first == "correction":
        once(monkeypatch, compaction, "commit_layout", lambda: correct(other))
        assert store.compact(fanout=2).num_lost == 1
    else:
        once(monkeypatch, correction, "commit_layout", lambda: other.compact(fanout=2))
        assert correct(store)
    after = HistoryStore.open(store.uri)
    after.compact(fanout=2)
    assert after.snapshot().count([1]).tolist() == [4]
    assert after.snapshot().verify(deep=True).ok


def test_a_late_window_is_committed_after_an_erasure_ended(
    store: HistoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Delta alone would put it on top of the erasure, as the two share no lock."""
    store.seal(day(0), table_of(event(1, 0, 1), event(2, 0, 1)))
    store.seal(day(2), table_of(event(1, 2, 1)))
    other = HistoryStore.open(store.uri)
    once(monkeypatch, commit, "_commit_once", lambda: other.erase([1], reason="ticket 7"))
    with pytest.raises(InvalidEventsError, match="were erased"):
        store.seal(day(1), table_of(event(1, 1, 1), event(2, 1, 1)))
    assert day(1) not in {one.window.key for one in store.sealed_windows()}


def test_a_scanned_segment_is_corrected_before_an_erasure_ends(
    store: HistoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the same name it holds the user again."""
    store.seal(day(0), table_of(event(1, 0, 1), event(2, 0, 1)))
    other = HistoryStore.open(store.uri)
    once(
        monkeypatch,
        erasure,
        "_end",
        lambda: other.correct(day(1), table_of(event(2, 1, 1), event(1, 1, 5)), reason="more"),
    )
    sealing = iter([lambda: other.seal(day(1), table_of(event(2, 1, 1)))])
    store.erase([1], reason="ticket 7", progress=lambda *_: next(sealing, lambda: None)())
    snapshot = HistoryStore.open(store.uri).snapshot()
    assert snapshot.read([1], Projection(["event_id"])).num_events == 0
    assert snapshot.num_events == 2


def test_a_file_about_to_be_committed_again_survives_an_erasure(
    store: HistoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compaction writes a file that only retired versions name, byte for byte the same, while somebody
    who has no rows in it is erased."""
    users = list(range(6))
    store.seal(day(0), table_of(*(event(u, 0, 1) for u in users)))
    store.seal(day(1), table_of(*(event(u, 1, 1) for u in users)))
    store.compact(fanout=2)
    store.correct(day(1), table_of(*(event(u, 1, 1) for u in users), event(0, 1, 9)), reason="one")
    other = HistoryStore.open(store.uri)
    once(monkeypatch, layout, "_commit_once", lambda: other.erase([99], reason="ticket 7"))
    store.compact(fanout=2)
    assert HistoryStore.open(store.uri).snapshot().verify(deep=True).ok


def test_a_correction_to_what_was_corrected_meanwhile_is_told(store: HistoryStore) -> None:
    old, new = table_of(event(1, 0, 1)), table_of(event(1, 0, 2))
    store.seal(day(0), old)
    staged = store.stage_correction(day(0), old, reason="as it is")
    HistoryStore.open(store.uri).correct(day(0), new, reason="as it should be")
    with pytest.raises(WindowError, match="meanwhile"):
        store.commit(staged)


# -- what is dropped while a pin has it ---------------------------------------------------------------


@pytest.fixture
def filled(store: HistoryStore) -> HistoryStore:
    for number in range(4):
        store.seal(day(number), table_of(*(event(u, number, u) for u in (1, 2, 5))))
    return store


def test_a_pin_that_moved_keeps_what_is_dropped_later(filled: HistoryStore) -> None:
    ref = filled.snapshot().ref()
    filled.pin("go-live")
    filled.compact(fanout=2, max_windows=2)
    filled.gc(dry_run=False, keep_hours=0, move_pins=True)
    assert ref.version in filled.sealed_table.state().retired
    filled.drop_before(day(2))
    assert ref.open().num_events == 12
    filled.gc(dry_run=False, keep_hours=0)
    assert HistoryStore.open(filled.uri).pinned_as("go-live").num_events == 12
    filled.gc(dry_run=False, keep_hours=0, let_dropped_go=True)
    assert HistoryStore.open(filled.uri).pinned_as("go-live").num_events == 6


def test_an_erasure_says_first_which_pins_would_lose_what_was_dropped(filled: HistoryStore) -> None:
    filled.pin("go-live")
    filled.drop_before(day(2))
    (lost,) = filled.erase([5], reason="ticket 7", dry_run=True).lost
    assert lost.holder == "go-live"
    with pytest.raises(PinError, match=r"dropped since.*--break-pins"):
        filled.erase([5], reason="ticket 7")
    assert filled.pinned_as("go-live").num_events == 12
    filled.erase([5], reason="ticket 7", break_pins=True)
    assert filled.pinned_as("go-live").num_events == 4


def test_pointers_cannot_be_built_where_the_history_was_dropped(
    filled: HistoryStore, tmp_path: Path
) -> None:
    """How many of the dropped events came before a request, nobody knows any more."""
    filled.drop_before(day(3))
    dataset = PointerDataset.create(tmp_path / "p", ["ratings"], request="request_time")

    def requests(number: int) -> pa.Table:
        return pa.table(
            {
                "user_id": pa.array([1], pa.int64()),
                "request_id": pa.array([number], pa.int64()),
                "request_time": pa.array([at(number, 2_000_000)], TIME),
            }
        )

    with pytest.raises(WindowError, match=r"dropped by age.*from 1997-09-23"):
        dataset.seal(day(1), requests(1), {"ratings": filled.snapshot()})
    dataset.seal(day(3), requests(3), {"ratings": filled.snapshot()})
    (row,) = dataset.snapshot().to_table().to_pylist()
    assert (row["ratings_end_position"], row["ratings_length"]) == (4, 1)


def test_the_log_names_no_user(tmp_path: Path) -> None:
    """It is kept for ever, so what stands there could never be erased."""
    group = group_of([{"user_id": "", "event_id": 0}])
    store = HistoryStore.create(tmp_path / "h", group, 2, start=FIRST_DAY)
    events = [{**event(1, 0, i), "user_id": f"user-{i}@example.org"} for i in range(5)]
    store.seal(day(0), event_table(events, group))
    store.compact(fanout=2)
    store.erase(["user-0@example.org"], reason="ticket 7")
    for path in Path(store.uri, "_delta_log").glob("*.json"):
        text = path.read_text()
        assert "example.org" not in text, path
        for line in text.splitlines():
            stats = json.loads(line).get("add", {}).get("stats")
            assert stats is None or "minValues" not in json.loads(stats)
