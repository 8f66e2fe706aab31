"""A correction makes a new revision of a window; what was pinned before replays the old one."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import histories
from strategies import day, event_lists, event_table, events_of_day, few, history_of, many_events

from vlm_dagster import HistoryStore, PointerDataset, Projection
from vlm_dagster.errors import InvalidEventsError, PinError, SchemaError, WindowError
from vlm_dagster.sealed.retired import retire

EVENTS = many_events(seed=8, num_events=1_000, num_users=15, num_days=8)
DAYS = range(8)
USERS = list(range(16))


def replaced(events: list[dict], number: int) -> list[dict]:
    """The events with a day's halved, and item ids changed."""
    some = {e["event_id"] for e in events_of_day(events, number)}
    return [
        {**e, "item_id": -e["item_id"]} if e["event_id"] in some else e
        for e in events
        if e["event_id"] not in some or e["event_id"] % 2
    ]


def correct(store: HistoryStore, events: list[dict], number: int):
    table = event_table(events_of_day(events, number), store.group)
    return store.correct(day(number), table, reason="wrong items")


def assert_is(store: HistoryStore, events: list[dict], version: int | None = None) -> None:
    snapshot = HistoryStore.open(store.uri).snapshot(version)
    truth = histories(events)
    read = snapshot.read(USERS, Projection(["event_id", "item_id"]))
    for row, user in enumerate(USERS):
        found = read.of(row)
        history = truth.get(user, [])
        assert found["event_id"].to_pylist() == [e["event_id"] for e in history]
        assert found["item_id"].to_pylist() == [e["item_id"] for e in history]
    assert snapshot.num_events == len(events)
    assert snapshot.verify(deep=True).ok


@pytest.mark.parametrize("fanout", [None, 2, 4, 8])
@pytest.mark.parametrize("number", [0, 3, 7])
def test_the_window_is_replaced_and_nothing_else(
    tmp_path: Path, number: int, fanout: int | None
) -> None:
    store = history_of(tmp_path / "h", EVENTS, days=DAYS)
    if fanout is not None:
        store.compact(fanout=fanout)
    before = store.snapshot()
    after = replaced(EVENTS, number)
    done = correct(store, after, number)
    assert (done.revision, done.reused, done.version) == (2, False, before.version + 1)
    assert_is(store, after)
    assert_is(store, EVENTS, before.version)
    assert store.version_sealing(day(number)) == done.version
    assert store.version_covering(day(number)) == done.version
    assert store.versions_sealing([day(number)]) == {day(number): done.version}
    if number:
        assert store.version_covering(day(number - 1)) < done.version
    store.compact(fanout=2)
    assert [s.num_windows for s in store.snapshot().segments] == [8]
    assert_is(store, after)
    assert_is(store, EVENTS, before.version)
    facts = store.snapshot().windows[number].facts
    assert (facts["reason"], facts["name"]) == ("wrong items", f"{day(number)}@2")
    assert facts["replaces"] == before.windows[number].digest


def test_old_pins_replay_the_old_revision_until_it_is_retired(tmp_path: Path) -> None:
    store = history_of(tmp_path / "h", EVENTS, days=DAYS)
    early = store.snapshot(store.version_covering(day(2))).ref()
    late = store.snapshot().ref()
    correct(store, replaced(EVENTS, 5), 5)
    assert late.open().num_events == len(EVENTS)
    retire(store._table, store.snapshot().version, [late.version], "a test")
    # What was covered before the corrected window is the same in the newest version.
    moved = early.open()
    assert moved.version == store.snapshot().version
    truth = histories([e for n in range(3) for e in events_of_day(EVENTS, n)])
    assert moved.count(USERS).tolist() == [len(truth.get(u, [])) for u in USERS]
    assert late.open().version == late.version
    retire(store._table, store.snapshot().version, [], "a test")
    with pytest.raises(PinError, match=r"was retired.*corrected"):
        late.open()


def test_the_same_content_changes_nothing(tmp_path: Path) -> None:
    store = history_of(tmp_path / "h", EVENTS, days=DAYS)
    version = store.snapshot().version
    done = correct(store, EVENTS, 4)
    assert done.reused
    assert (done.revision, store.snapshot().version) == (1, version)


def test_a_window_becomes_empty_and_full_again(tmp_path: Path) -> None:
    store = history_of(tmp_path / "h", EVENTS, days=DAYS)
    store.compact(fanout=8)
    others = [e for e in EVENTS if e not in events_of_day(EVENTS, 4)]
    correct(store, others, 4)
    assert_is(store, others)
    store.compact(fanout=2)
    assert correct(store, EVENTS, 4).revision == 3
    assert_is(store, EVENTS)


@few(15)
@given(event_lists(), event_lists(), st.integers(0, 3), st.booleans())
def test_of_any_histories(old: list[dict], new: list[dict], number: int, compacted: bool) -> None:
    with TemporaryDirectory() as folder:
        store = history_of(folder, old)
        if compacted:
            store.compact(fanout=2)
        version = store.snapshot().version
        before = {
            e["user_id"]: store.snapshot().read([e["user_id"]], Projection(["event_id"])).columns
            for e in old
        }
        day_of_new = events_of_day(new, number)
        store.correct(day(number), event_table(day_of_new, store.group), reason="of any")
        events = [e for e in old if e not in events_of_day(old, number)] + day_of_new
        truth = histories(events)
        snapshot = HistoryStore.open(folder).snapshot()
        for user, history in truth.items():
            read = snapshot.read([user], Projection(["event_id"]))
            assert read.columns["event_id"].to_pylist() == [e["event_id"] for e in history]
        assert snapshot.verify(deep=True).ok
        old_snapshot = HistoryStore.open(folder).snapshot(version)
        for user, columns in before.items():
            assert old_snapshot.read([user], Projection(["event_id"])).columns == columns


def test_what_cannot_be_corrected_is_refused(tmp_path: Path) -> None:
    store = history_of(tmp_path / "h", EVENTS, days=range(6))
    with pytest.raises(WindowError, match=r"not sealed.*seal it"):
        correct(store, EVENTS, 6)
    with pytest.raises(SchemaError, match="without a reason"):
        store.correct(day(3), event_table([], store.group), reason=" ")
    with pytest.raises(InvalidEventsError, match="lies outside window"):
        store.correct(day(3), event_table(events_of_day(EVENTS, 4), store.group), reason="x")
    store.drop_before(day(2))
    with pytest.raises(WindowError, match="was dropped"):
        correct(store, EVENTS, 1)
    from test_erasure import erase

    erase(store, [3])
    with pytest.raises(InvalidEventsError, match="were erased"):
        correct(store, replaced(EVENTS, 4), 4)


def test_of_two_corrections_one_is_told(tmp_path: Path) -> None:
    store = history_of(tmp_path / "h", EVENTS, days=DAYS)
    table = event_table(events_of_day([e for e in EVENTS if e["event_id"] % 3], 3), store.group)
    staged = store.stage_correction(day(3), table, reason="late")
    correct(HistoryStore.open(store.uri), replaced(EVENTS, 3), 3)
    with pytest.raises(WindowError, match="meanwhile"):
        store.commit(staged)
    assert_is(store, replaced(EVENTS, 3))


def test_pointers_are_bound_to_the_revision_they_were_built_on(tmp_path: Path) -> None:
    store = history_of(tmp_path / "h", EVENTS, days=DAYS)
    wanted = events_of_day(EVENTS, 6)
    from test_erasure import examples_of, loaded

    dataset = PointerDataset.create(tmp_path / "p", ["ratings"])
    dataset.seal(day(6), examples_of(EVENTS, 6), {"ratings": store.snapshot()})
    before = loaded(dataset)
    correct(store, replaced(EVENTS, 2), 2)
    store.compact(fanout=2)
    assert loaded(PointerDataset.open(dataset.uri)) == before
    assert len(before[0]) == len(wanted)


def test_an_erasure_says_first_which_pins_it_would_break(tmp_path: Path) -> None:
    from test_erasure import examples_of, loaded

    store = history_of(tmp_path / "h", EVENTS, days=DAYS)
    dataset = PointerDataset.create(tmp_path / "p", ["ratings"])
    dataset.seal(day(6), examples_of(EVENTS, 6), {"ratings": store.snapshot()})
    correct(store, replaced(EVENTS, 2), 2)
    version = store.snapshot().version
    with pytest.raises(
        PinError, match=r"pointer dataset .*corrected or dropped since.*--break-pins"
    ):
        store.erase([3], reason="ticket 7")
    assert store.snapshot().version == version
    (lost,) = store.erase([3], reason="ticket 7", dry_run=True).lost
    assert lost.holder == dataset.uri
    store.erase([3], reason="ticket 7", break_pins=True)
    with pytest.raises(PinError, match="corrected content"):
        loaded(PointerDataset.open(dataset.uri))
