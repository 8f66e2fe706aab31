"""Dropping the oldest windows by age keeps every position true."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import histories
from strategies import day, events_of_day, few, history_of, many_events, seal_days
from test_erasure import NAMES, erase, examples_of, loaded

from vlm_dagster import HistoryStore, PointerDataset, Projection, SequenceLoader
from vlm_dagster.errors import GoneError, PinError
from vlm_dagster.sealed.retired import retire

EVENTS = many_events(seed=13, num_events=1_200, num_users=18, num_days=8)
DAYS = range(8)
USERS = list(range(19))


def drop(store: HistoryStore, number: int) -> None:
    """Drop what lies before a day, and let go of the versions that still have it."""
    store.drop_before(day(number))
    retire(store._table, store.snapshot().version, [], "a test")


def assert_tail(store: HistoryStore, events: list[dict], first_day: int) -> None:
    """What is left are the events from a day on, at the positions that they always had."""
    snapshot = HistoryStore.open(store.uri).snapshot()
    limit = {e["event_id"] for n in range(first_day, 8) for e in events_of_day(events, n)}
    truth = histories(events)
    for length in (None, 3):
        read = snapshot.read(USERS, Projection(NAMES, length))
        for row, user in enumerate(USERS):
            history = truth.get(user, [])
            kept = [e["event_id"] for e in history if e["event_id"] in limit]
            assert read.of(row)["event_id"].to_pylist() == (kept if length is None else kept[-3:])
            assert read.end_positions[row] == len(history)
    assert snapshot.verify(deep=True).ok
    rows = pl.scan_delta(store.uri).select("event_id").collect()["event_id"].to_list()
    assert sorted(rows) == sorted(limit)


def test_what_is_left_is_where_it_was(tmp_path: Path) -> None:
    store = history_of(tmp_path / "h", EVENTS, days=DAYS)
    digest = store.snapshot().digest
    planned = store.drop_before(day(3), reason="a year is enough", dry_run=True)
    assert store.snapshot().num_events == len(EVENTS)
    done = store.drop_before(day(3), reason="a year is enough")
    assert (done.windows, done.num_rows) == (planned.windows, planned.num_rows)
    assert done.windows == (day(0), day(1), day(2))
    assert_tail(store, EVENTS, 3)
    assert store.snapshot().digest == digest
    (removal,) = store.snapshot().removals
    assert (removal.kind, removal.reason, removal.through) == ("drop", "a year is enough", day(2))
    assert store.drop_before(day(3)).windows == ()
    store.compact(fanout=2)
    assert_tail(store, EVENTS, 3)
    assert store.drop_before(day(5)).windows == ()  # one segment holds later ones too
    assert store.drop_before(day(5), dry_run=True).kept_for_segment == (day(3), day(4))


def test_whole_segments_go_and_the_rest_is_named(tmp_path: Path) -> None:
    store = history_of(tmp_path / "h", EVENTS, days=DAYS)
    store.compact(fanout=2, max_windows=2)
    done = store.drop_before(day(5))
    assert done.windows == tuple(day(n) for n in range(4))
    assert done.kept_for_segment == (day(4),)
    assert_tail(store, EVENTS, 4)
    store.drop_before(day(6))
    assert_tail(store, EVENTS, 6)


def test_of_an_empty_store_nothing_goes(tmp_path: Path) -> None:
    store = history_of(tmp_path / "h", EVENTS, days=[])
    assert store.drop_before(day(3)).windows == ()


@few(10)
@given(st.data())
def test_dropping_erasing_and_compacting_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    store = history_of(tmp_path_factory.mktemp("h"), EVENTS, days=DAYS)
    truth = histories(EVENTS)
    gone: dict[int, set[int]] = {}
    steps = st.sampled_from(["drop", "erase", "compact"])
    for step in data.draw(st.lists(steps, min_size=1, max_size=5)):
        if step == "compact":
            store.compact(fanout=data.draw(st.sampled_from([2, 4])), max_windows=4)
        elif step == "erase":
            user = data.draw(st.sampled_from(USERS))
            erase(store, [user])
            gone[user] = {e["event_id"] for e in truth.get(user, [])}
        else:
            done = store.drop_before(day(data.draw(st.integers(0, 7))))
            days = [n for n in DAYS if day(n) in done.windows]
            for event in (e for n in days for e in events_of_day(EVENTS, n)):
                gone.setdefault(event["user_id"], set()).add(event["event_id"])
    snapshot = HistoryStore.open(store.uri).snapshot()
    read = snapshot.read(USERS, Projection(["event_id"]))
    for row, user in enumerate(USERS):
        history = [e["event_id"] for e in truth.get(user, [])]
        left = [e for e in history if e not in gone.get(user, ())]
        assert read.of(row)["event_id"].to_pylist() == left
        assert read.end_positions[row] == len(history)
    assert snapshot.verify(deep=True).ok


# -- pointers -------------------------------------------------------------------------------------


def pointers_to(store: HistoryStore, uri: Path, **options: object) -> PointerDataset:
    dataset = PointerDataset.create(uri, ["ratings"], **options)
    for number in (5, 6, 7):
        dataset.seal(day(number), examples_of(EVENTS, number), {"ratings": store.snapshot()})
    return dataset


@pytest.mark.parametrize("length", [1, 4, 30])
def test_short_tenants_go_on_reading_and_verifying(tmp_path: Path, length: int) -> None:
    """A pointer spans the whole history; the ledger knows the checksum of what was dropped."""
    store = history_of(tmp_path / "h", EVENTS, days=DAYS)
    dataset = pointers_to(store, tmp_path / "p")

    def read(**options: object) -> tuple[dict, int]:
        projections = {"ratings": Projection(["event_id"], length)}
        loader = SequenceLoader(dataset.ref(), projections, 1, **options)
        found = {}
        for batch in loader:
            key = (int(batch.examples["user_id"]), int(batch.examples["request_id"]))
            found[key] = batch.sequences["ratings"].values["event_id"].tolist()
        return found, loader.num_dropped

    before, _ = read()
    drop(store, 2)
    drop(store, 3)
    dropped = {e["event_id"] for n in range(3) for e in events_of_day(EVENTS, n)}
    readable = {key: ids for key, ids in before.items() if not dropped.intersection(ids)}
    after, num_dropped = read(gone="drop")
    assert after == readable
    assert num_dropped == len(before) - len(readable)
    if num_dropped:
        with pytest.raises(GoneError):
            read()


def test_a_wrong_checksum_is_still_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_dagster.errors import ChecksumError
    from vlm_dagster.sealed import gone

    store = history_of(tmp_path / "h", EVENTS, days=DAYS)
    dataset = pointers_to(store, tmp_path / "p")
    original = gone.GoneUsers.checksums_of

    def wrong(self: gone.GoneUsers, *args: object):
        sums, certain = original(self, *args)
        return sums + 1, certain

    drop(store, 3)
    projections = {"ratings": Projection(["event_id"], 1)}
    assert list(SequenceLoader(dataset.ref(), projections, 8, gone="drop"))
    monkeypatch.setattr(gone.GoneUsers, "checksums_of", wrong)
    with pytest.raises(ChecksumError):
        list(SequenceLoader(dataset.ref(), projections, 8, gone="drop"))


def test_pointers_that_start_later_cannot_be_verified_and_say_so(tmp_path: Path) -> None:
    store = history_of(tmp_path / "h", EVENTS, days=DAYS)
    dataset = pointers_to(store, tmp_path / "p", max_length=20)
    before, _ = loaded(dataset)
    drop(store, 3)
    after, num_dropped = loaded(dataset, gone="drop")
    assert after.items() <= before.items()
    assert num_dropped == len(before) - len(after) > 0


def test_new_pointers_span_what_is_left(tmp_path: Path) -> None:
    store = history_of(tmp_path / "h", EVENTS, days=DAYS)
    store.drop_before(day(3))
    dataset = pointers_to(store, tmp_path / "p")
    found, num_dropped = loaded(dataset)
    assert num_dropped == 0
    left = {e["event_id"] for n in range(3, 8) for e in events_of_day(EVENTS, n)}
    truth = histories(EVENTS)
    times = {e["event_id"]: e["available_at"] for e in EVENTS}
    for (user, request), values in found.items():
        expected = [
            e["event_id"]
            for e in truth[user]
            if e["available_at"] < times[request] and e["event_id"] in left
        ]
        assert values["event_id"] == expected


def test_a_pin_of_only_dropped_windows_says_so(tmp_path: Path) -> None:
    store = history_of(tmp_path / "h", EVENTS, days=DAYS)
    old = store.snapshot(store.version_covering(day(1))).ref()
    later = store.snapshot(store.version_covering(day(6))).ref()
    store.drop_before(day(3))
    assert old.open().count([0])[0] > 0  # its files are still there
    retire(store._table, store.snapshot().version, [], "a test")
    with pytest.raises(PinError, match="dropped by age"):
        old.open()
    truth = histories([e for n in range(7) for e in events_of_day(EVENTS, n)])
    assert later.open().count(USERS).tolist() == [len(truth.get(u, [])) for u in USERS]


def test_a_pin_of_nothing_stays_a_pin_of_nothing(tmp_path: Path) -> None:
    store = history_of(tmp_path / "h", EVENTS, days=[])
    empty = store.snapshot().ref()
    seal_days(store, EVENTS, DAYS)
    drop(store, 3)
    snapshot = empty.open()
    assert snapshot.version == store.snapshot().version
    assert snapshot.count(USERS).tolist() == [0] * len(USERS)
    assert snapshot.num_events == 0


def test_pins_hold_dropped_files_until_they_are_let_go(tmp_path: Path) -> None:
    store = history_of(tmp_path / "h", EVENTS, days=DAYS)
    dataset = pointers_to(store, tmp_path / "p")
    before, _ = loaded(dataset)
    sizes = store.drop_before(day(3)).num_bytes
    for moving in (False, True):
        kept = store.gc(dry_run=False, keep_hours=0, move_pins=moving)
        assert kept.purged.num_bytes < sizes
        assert loaded(PointerDataset.open(dataset.uri)) == (before, 0)
    gone = store.gc(dry_run=False, keep_hours=0, move_pins=True, let_dropped_go=True)
    assert gone.purged.num_bytes >= sizes
    assert not gone.holding.lost
    after, num_dropped = loaded(PointerDataset.open(dataset.uri), gone="drop")
    assert after.items() < before.items()
    assert num_dropped == len(before) - len(after) > 0
    again = store.gc(dry_run=False, keep_hours=0, move_pins=True)
    assert (again.purged.num_files, again.holding.lost) == (0, ())
