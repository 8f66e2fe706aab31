"""What is held is kept, to the byte; everything else goes, and nothing but that."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError
from hypothesis import example, given
from hypothesis import strategies as st
from retention import (
    EVENTS,
    at_version,
    compacted,
    content,
    data_files,
    named_by,
    pointers_on,
    requests_of,
)
from strategies import day, event_table, events_of_day, few, files_below, history_of

from vlm_dagster import HistoryStore, PointerDataset, Projection, SnapshotRef
from vlm_dagster.errors import CorruptFileError, PinError, RetiredVersionError, SchemaError
from vlm_dagster.retention import purge
from vlm_dagster.sealed.lifetimes import FOREVER, Lifetimes
from vlm_dagster.sealed.retired import retire


@pytest.fixture
def store(tmp_path: Path) -> HistoryStore:
    return compacted(tmp_path / "history")


# -- what goes ------------------------------------------------------------------------------------


def test_what_nothing_refers_to_goes(store: HistoryStore) -> None:
    newest = store.snapshot().version
    before = at_version(store, newest)
    report = store.gc(keep_hours=0, dry_run=False)
    assert report.holding.num_to_retire == newest
    assert data_files(store.uri) == named_by(store.uri, [newest])
    assert at_version(store, newest) == before
    assert HistoryStore.open(store.uri).snapshot().verify(deep=True).ok


def test_a_dry_run_changes_nothing_and_says_what_would_go(store: HistoryStore) -> None:
    before = files_below(store.uri)
    planned = store.gc(keep_hours=0)
    assert files_below(store.uri) == before
    done = store.gc(keep_hours=0, dry_run=False)
    assert planned.purged.files == done.purged.files
    assert planned.holding.kept == done.holding.kept
    assert {info.path for info in done.purged.files} == before - files_below(store.uri)


def test_recent_versions_are_kept(store: HistoryStore) -> None:
    before = files_below(store.uri)
    report = store.gc(dry_run=False)
    assert files_below(store.uri) == before
    assert (report.holding.since, report.holding.num_to_retire) == (0, 0)
    assert report.holding.recent_bytes > 0


def test_collecting_again_does_nothing(store: HistoryStore) -> None:
    store.gc(keep_hours=0, dry_run=False)
    before, version = files_below(store.uri), store.snapshot().version
    again = store.gc(keep_hours=0, dry_run=False)
    assert (again.purged.num_files, again.holding.num_to_retire) == (0, 0)
    assert files_below(store.uri) == before
    assert store.snapshot().version == version


def test_staged_files_and_those_of_others_are_left_alone(store: HistoryStore) -> None:
    staged = store.stage(day(9), event_table([], store.group))
    kept = ["segment=1997-12-01/bucket=0/abc.parquet", "segment=1997-09-20/notes.txt", "notes.txt"]
    for path in kept:
        Path(store.uri, path).parent.mkdir(parents=True, exist_ok=True)
        Path(store.uri, path).write_bytes(b"x")
    store.gc(keep_hours=0, dry_run=False)
    assert files_below(store.uri) >= set(kept)
    store.seal(day(8), event_table([], store.group))
    assert store.commit(staged).version


def test_pins_hold_their_versions_to_the_byte(store: HistoryStore) -> None:
    old = {"first": 1, "middle": 5, "pairs": 12}
    before = {version: at_version(store, version) for version in old.values()}
    for name, version in old.items():
        store.pin(name, version, reason="test")
    report = store.gc(keep_hours=0, dry_run=False)
    newest = report.holding.version
    assert [kept.version for kept in report.holding.kept] == [newest, 12, 5, 1]
    assert data_files(store.uri) == named_by(store.uri, [1, 5, 12, newest])
    assert {version: at_version(store, version) for version in old.values()} == before
    assert content(store.pinned_as("middle")) == before[5]
    sizes = {path: Path(store.uri, path).stat().st_size for path in data_files(store.uri)}
    for kept in report.holding.kept:
        others = [k.version for k in report.holding.kept if k is not kept]
        own = named_by(store.uri, [kept.version]) - named_by(store.uri, others)
        assert kept.own_bytes == sum(sizes[path] for path in own)
        assert kept.num_bytes == sum(sizes[path] for path in named_by(store.uri, [kept.version]))
    for name in old:
        store.unpin(name)
    store.gc(keep_hours=0, dry_run=False)
    assert data_files(store.uri) == named_by(store.uri, [newest])


def test_pins_move_forward_after_proof(store: HistoryStore, tmp_path: Path) -> None:
    dataset = pointers_on(store, tmp_path / "pointers", [2, 5])
    store.pin("old", 3)
    refs = [*dataset.ref().pins, SnapshotRef.from_json(store.find_pin("old").ref)]
    before = [content(ref.open()) for ref in refs]
    report = store.gc(keep_hours=0, move_pins=True, verify=True, dry_run=False)
    assert {hold.pin for hold in report.holding.moved} == set(refs)
    newest = report.holding.version
    assert data_files(store.uri) == named_by(store.uri, [newest])
    assert [ref.open().version >= newest for ref in refs] == [True] * 3
    assert [content(ref.open()) for ref in refs] == before
    assert dataset.snapshot().pins()["ratings"][0].open().ref() == dataset.ref().pins[0]
    # They hold the version that they open, for as long as that is not the newest.
    assert store.gc(keep_hours=0).holding.num_to_retire == 0


def test_the_loader_reads_moved_pins_the_same(store: HistoryStore, tmp_path: Path) -> None:
    from vlm_dagster import SequenceLoader

    dataset = pointers_on(store, tmp_path / "pointers", range(1, 7))

    def batches() -> list[object]:
        loader = SequenceLoader(
            dataset.ref(), {"ratings": Projection(["item_id"], 16)}, batch_size=32, seed=1
        )
        return [
            (b.sequences["ratings"].values["item_id"].tolist(), b.sequences["ratings"].offsets.tolist())
            for b in loader
        ]  # fmt: skip

    before = batches()
    assert store.gc(keep_hours=0, move_pins=True, dry_run=False).purged.num_files > 10
    dataset.gc(keep_hours=0, move_pins=True, dry_run=False)
    assert batches() == before


def test_a_damaged_newest_version_gets_no_pins(store: HistoryStore) -> None:
    store.pin("old", 3)
    path = Path(store.uri, store.snapshot().files()["path"][0].as_py())
    path.write_bytes(path.read_bytes()[:-1])
    before = files_below(store.uri)
    with pytest.raises(CorruptFileError, match="no pin was moved"):
        store.gc(keep_hours=0, move_pins=True, verify=True, dry_run=False)
    assert files_below(store.uri) == before


@pytest.mark.parametrize("hours", [-1, float("nan"), True])
def test_hours_that_make_no_sense_are_refused(store: HistoryStore, hours: float) -> None:
    with pytest.raises(SchemaError, match="0 or more"):
        store.gc(keep_hours=hours)


# -- corrections and drops ------------------------------------------------------------------------


def correct(store: HistoryStore, number: int) -> None:
    table = event_table(events_of_day(EVENTS, number), store.group)
    at = table.schema.get_field_index("rating")
    ratings = pa.array([9.0] * table.num_rows, table.schema.field(at).type)
    store.correct(day(number), table.set_column(at, "rating", ratings), reason="wrong ratings")


def test_pins_to_corrected_content_cannot_move(store: HistoryStore) -> None:
    store.pin("before", 4)
    before = at_version(store, 4)
    store.pin("early", 1)
    correct(store, 2)
    report = store.gc(keep_hours=0, move_pins=True, dry_run=False)
    assert [hold.holder for hold in report.holding.moved] == ["early"]
    assert [kept.version for kept in report.holding.kept][1:] == [4]
    assert content(store.pinned_as("before")) == before


def test_pins_that_moved_hold_the_last_version_before_a_correction(store: HistoryStore) -> None:
    store.pin("before", 4)
    before = at_version(store, 4)
    store.gc(keep_hours=0, move_pins=True, dry_run=False)
    last = store.snapshot().version
    correct(store, 2)
    assert content(store.pinned_as("before")) == before
    report = store.gc(keep_hours=0, move_pins=True, dry_run=False)
    assert [kept.version for kept in report.holding.kept][1:] == [last]
    assert content(HistoryStore.open(store.uri).pinned_as("before")) == before
    store.compact(fanout=2)
    store.gc(keep_hours=0, move_pins=True, dry_run=False)
    assert content(HistoryStore.open(store.uri).pinned_as("before")) == before
    store.unpin("before")
    assert store.gc(keep_hours=0, dry_run=False).purged.num_files > 0
    assert len(store.gc(keep_hours=0).holding.kept) == 1


def test_an_erasure_says_that_it_would_break_pins_that_moved(store: HistoryStore) -> None:
    store.pin("before", 4)
    store.gc(keep_hours=0, move_pins=True, dry_run=False)
    correct(store, 2)
    with pytest.raises(
        PinError, match=r"pin before.*corrected or dropped since.*Nothing was changed"
    ):
        store.erase([1], reason="asked")
    store.pinned_as("before")


def test_pins_do_not_move_over_dropped_windows(tmp_path: Path) -> None:
    store = history_of(tmp_path / "h", EVENTS, days=range(8))
    store.pin("all", 8)
    before = at_version(store, 8)
    store.drop_before(day(3), reason="age")
    report = store.gc(keep_hours=0, move_pins=True, dry_run=False)
    assert not report.holding.moved
    assert content(store.pinned_as("all")) == before
    store.unpin("all")
    store.gc(keep_hours=0, dry_run=False)
    assert {path.partition("/")[0] for path in data_files(store.uri)} == {
        f"segment={day(n)}" for n in range(3, 8) if events_of_day(EVENTS, n)
    }


def test_what_refers_to_content_that_is_gone_is_said(store: HistoryStore) -> None:
    store.pin("before", 4)
    correct(store, 2)
    retire(store.sealed_table, store.snapshot().version, [], "somebody")
    report = store.gc(keep_hours=0)
    assert [hold.holder for hold in report.holding.lost] == ["before"]
    with pytest.raises(PinError, match="retired"):
        store.pinned_as("before")


# -- readers --------------------------------------------------------------------------------------


def test_a_reader_whose_version_was_collected_is_told(store: HistoryStore) -> None:
    snapshot = HistoryStore.open(store.uri).snapshot(12)
    begun = HistoryStore.open(store.uri).snapshot(12)
    begun.read(USER)  # its footers are read already
    ref = snapshot.ref()
    before = at_version(store, 12)
    store.gc(keep_hours=0, dry_run=False)
    for one in (snapshot, begun):
        with pytest.raises(RetiredVersionError, match=r"version 12 of .* retired by gc") as caught:
            one.read(range(13), Projection(["title"]))
        assert "Open the pin again" in str(caught.value)
    with pytest.raises(RetiredVersionError):
        snapshot.verify()
    assert content(ref.open()) == before


USER = [0]


def test_a_file_that_a_kept_version_needs_is_still_missing(store: HistoryStore) -> None:
    store.pin("old", 3)
    store.gc(keep_hours=0, dry_run=False)
    Path(store.uri, HistoryStore.open(store.uri).snapshot(3).files()["path"][0].as_py()).unlink()
    with pytest.raises(CorruptFileError, match="is missing"):
        at_version(store, 3)
    # A reader that opened it under a version that was retired since hears no excuse either.
    snapshot = HistoryStore.open(store.uri).snapshot(2)
    with pytest.raises(CorruptFileError, match="is missing"):
        snapshot.read(range(13))


# -- the ledger -----------------------------------------------------------------------------------


def test_old_editions_of_the_ledger_go(tmp_path: Path) -> None:
    store = history_of(tmp_path / "h", EVENTS, days=range(6))
    store.erase([1], reason="asked")
    store.erase([2, 3], reason="asked")
    store.drop_before(day(2), reason="age")
    store.pin("kept", store.snapshot().version)
    store.drop_before(day(3), reason="age")
    before = at_version(store, store.find_pin("kept").version)

    def sidecars() -> set[str]:
        return {path for path in files_below(store.uri) if path.startswith("_gone/")}

    num_before = len(sidecars())
    store.gc(keep_hours=0, dry_run=False)
    assert 0 < len(sidecars()) < num_before
    assert at_version(store, store.find_pin("kept").version) == before
    store.unpin("kept")
    store.gc(keep_hours=0, dry_run=False)
    state = HistoryStore.open(store.uri).sealed_table.state()
    # What a writer put in place and never named in a commit may still be named: for a day.
    (edition,) = sidecars() & set(Lifetimes(store.sealed_table).sidecars())
    for path in sidecars():
        os.utime(Path(store.uri, path), (0, 0))
    store.gc(keep_hours=0, dry_run=False)
    named = json.loads(Path(store.uri, edition).read_text())["buckets"].values()
    assert sidecars() == {edition, *named}
    assert state.gone.removals
    # What asks for every version of the past still gets an answer.
    assert HistoryStore.open(store.uri).version_covering(day(1)) >= 1
    with pytest.raises(RetiredVersionError):
        HistoryStore.open(store.uri).snapshot(8).read([0])


# -- lifetimes ------------------------------------------------------------------------------------


def test_lifetimes_are_what_delta_says_at_every_version(store: HistoryStore) -> None:
    """Also of files that another writer removed and brought back."""
    version = store.snapshot().version
    DeltaTable(store.uri).restore(3)
    DeltaTable(store.uri).restore(version)
    lifetimes = Lifetimes(store.sealed_table)
    for one in range(lifetimes.newest + 1):
        found = {p for p, spans in lifetimes.files() if any(a <= one < b for a, b in spans)}
        assert found == named_by(store.uri, [one]), one


def test_over_commits_that_were_cleaned_away_nothing_is_guessed(store: HistoryStore) -> None:
    newest = store.snapshot().version
    truth = dict(Lifetimes(store.sealed_table).files())
    DeltaTable(store.uri).create_checkpoint()
    for version in range(5):
        Path(store.uri, f"_delta_log/{version:020d}.json").unlink()
    lifetimes = Lifetimes(HistoryStore.open(store.uri).sealed_table)
    for version in range(newest + 1):
        try:
            opened = DeltaTable(store.uri, version=version).version() == version
        except (DeltaError, TableNotFoundError):
            opened = False
        assert lifetimes.can_open(version) == opened, version
    assert not lifetimes.can_open(3)
    for path, spans in lifetimes.files():
        for first, end in truth[path]:
            assert any(a <= first and (end <= b or b == FOREVER) for a, b in spans), path


def test_a_file_that_came_back_is_spared(store: HistoryStore) -> None:
    """Somebody may be about to commit what was put in place since it was last removed."""
    path = next(iter(named_by(store.uri, [3]) - named_by(store.uri, [store.snapshot().version])))
    data = Path(store.uri, path).read_bytes()
    Path(store.uri, path).unlink()
    Path(store.uri, path).write_bytes(data)
    report = store.gc(keep_hours=0, dry_run=False)
    assert report.purged.num_spared == 1
    assert path in data_files(store.uri)
    assert purge(store.sealed_table, grace_s=0).num_files == 1
    assert path not in data_files(store.uri)


# -- any order ------------------------------------------------------------------------------------

STEPS = st.one_of(
    st.just(("seal",)),
    st.tuples(st.just("compact"), st.integers(2, 4), st.sampled_from([2, 4, 8])),
    st.tuples(st.just("pin"), st.integers(0, 40)),
    st.tuples(st.just("unpin"), st.integers(0, 3)),
    st.tuples(st.just("point"), st.integers(0, 40)),
    st.tuples(st.just("correct"), st.integers(0, 7)),
    st.tuples(st.just("gc"), st.booleans()),
)


@few(25)
@example(steps=[("seal",), ("correct", 0), ("compact", 2, 2), ("correct", 0)])
@given(steps=st.lists(STEPS, min_size=4, max_size=14))
def test_whatever_happens_what_is_pinned_replays(
    steps: list[tuple], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any-order")
    store = history_of(folder / "h", EVENTS, days=[0])
    dataset = PointerDataset.create(folder / "p", ["ratings"], num_buckets=2)
    sealed = 1
    truth: dict[str, object] = {}
    pointed: dict[str, object] = {}
    for step in (*steps, ("gc", True)):
        kind = step[0]
        if kind == "seal" and sealed < 8:
            store.seal(day(sealed), event_table(events_of_day(EVENTS, sealed), store.group))
            sealed += 1
        elif kind == "compact":
            store.compact(fanout=step[1], max_windows=step[2])
        elif kind == "pin":
            version = step[1] % (store.snapshot().version + 1)
            name = f"pin-{len(truth)}-{version}"
            try:
                store.pin(name, version)
            except RetiredVersionError:
                continue
            truth[name] = at_version(store, version)
        elif kind == "unpin" and truth:
            name = sorted(truth)[step[1] % len(truth)]
            store.unpin(name)
            del truth[name]
        elif kind == "point":
            number = step[1] % sealed
            if day(number) not in pointed:
                try:
                    snapshot = store.ref(store.version_covering(day(number))).open()
                    dataset.seal(day(number), requests_of(number), {"ratings": snapshot})
                except PinError:  # corrected since, and retired before anything referred to it
                    continue
                pointed[day(number)] = content(snapshot)
        elif kind == "correct":
            correct(store, step[1] % sealed)
        elif kind == "gc":
            before = files_below(store.uri)
            planned = store.gc(keep_hours=0, move_pins=step[1])
            done = store.gc(keep_hours=0, move_pins=step[1], dry_run=False)
            assert planned.purged.files == done.purged.files
            gone = before - files_below(store.uri)
            assert gone == {info.path for info in done.purged.files}
            # Nothing is left that no kept version needs, and nothing else was taken.
            kept = [k.version for k in done.holding.kept]
            left = data_files(store.uri) - named_by(store.uri, kept) - still_kept(store)
            # What a correction to the same content staged again, and did not need, waits a day.
            assert len(left) == done.purged.num_spared
            assert data_files(store.uri) >= named_by(store.uri, kept)
            assert not done.holding.lost
    for name, expected in truth.items():
        assert content(HistoryStore.open(store.uri).pinned_as(name)) == expected
    for key, expected in pointed.items():
        pin = PointerDataset.open(dataset.uri).snapshot([key]).pins_of(key)["ratings"]
        assert content(pin.open()) == expected
    assert HistoryStore.open(store.uri).snapshot().verify(deep=True).ok


def still_kept(store: HistoryStore) -> set[str]:
    """Files of versions that are not retired, as their letting go would free nothing."""
    state = HistoryStore.open(store.uri).sealed_table.state()
    versions = [v for v in range(state.version + 1) if v not in state.retired]
    return named_by(store.uri, versions)
