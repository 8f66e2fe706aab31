"""Erased users are gone from every live version; everybody else's sequences stay as they were."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import histories
from strategies import (
    at,
    day,
    event_lists,
    event_table,
    events_of_day,
    few,
    files_below,
    history_of,
    integer_ids,
    many_events,
    string_ids,
)

from vlm_dagster import HistoryStore, PointerDataset, Projection, SequenceLoader
from vlm_dagster.errors import (
    CorruptFileError,
    GoneError,
    InvalidEventsError,
    SchemaError,
    TableError,
    WindowSealedError,
)
from vlm_dagster.sealed.stripes import Stripes
from vlm_dagster.sealed.users import decode_users

EVENTS = many_events(seed=5, num_events=1_200, num_users=20)
USERS = list(range(21))
NAMES = ["event_id", "available_at", "item_id", "title"]


def erase(store: HistoryStore, users: Collection[object]) -> tuple[int, int]:
    """The version afterwards, and how many rows left."""
    report = store.erase(sorted(set(users)), reason="asked for")
    assert store.snapshot().removals[-1].done
    return report.version, report.num_rows


def assert_only(store: HistoryStore, events: list[dict], erased: Collection[object]) -> None:
    """The newest version holds the reference's histories, but nothing of the erased users."""
    store = HistoryStore.open(store.uri)
    snapshot = store.snapshot()
    truth = histories(events)
    for length in (None, 2):
        read = snapshot.read(list(truth), Projection(NAMES, length))
        for row, (user, history) in enumerate(truth.items()):
            assert read.end_positions[row] == len(history)
            kept = [] if user in erased else history[-length if length else 0 :]
            assert read.of(row)["event_id"].to_pylist() == [e["event_id"] for e in kept]
    assert snapshot.verify(deep=True).ok
    left = [e for e in events if e["user_id"] not in erased]
    assert snapshot.num_events == len(left)
    assert snapshot.num_events_gone == len(events) - len(left)
    rows = pl.scan_delta(store.uri).select("user_id", "event_id").collect().rows()
    assert sorted(rows) == sorted((e["user_id"], e["event_id"]) for e in left)


@few(25)
@given(st.data(), st.sampled_from(["int", "string"]))
def test_nothing_of_them_is_left_and_all_others_are_as_they_were(
    data: st.DataObject, kind: str
) -> None:
    ids = integer_ids if kind == "int" else string_ids
    events = data.draw(event_lists(user_ids=ids))
    users = sorted({e["user_id"] for e in events})
    erased = data.draw(st.lists(st.sampled_from(users), unique=True)) if users else []
    stranger = "nobody at all" if kind == "string" and events else 987_654_321
    with TemporaryDirectory() as folder:
        store = history_of(folder, events)
        digest = store.snapshot().digest
        if data.draw(st.booleans()):
            store.compact(fanout=2)
        _, num_rows = erase(store, [*erased, stranger])
        assert num_rows == sum(e["user_id"] in erased for e in events)
        assert_only(store, events, erased)
        assert store.snapshot().digest == digest  # pins stay true
        store.compact(fanout=4)
        assert_only(store, events, erased)
        if erased:
            assert erase(store, erased)[1] == 0


def test_no_file_on_disk_knows_them(tmp_path: Path) -> None:
    events = [{**e, "user_id": f"user-{e['user_id']}-secret"} for e in EVENTS]
    store = history_of(tmp_path / "h", events)
    store.compact(fanout=2)
    store.drop_before(day(1))
    dataset = PointerDataset.create(tmp_path / "p", ["ratings"], user_id=pa.string())
    dataset.seal(day(2), examples_of(events, 2), {"ratings": store.snapshot()})
    secret = "user-3-secret"
    assert secret in known_to(store.uri)
    assert secret in known_to(dataset.uri)
    for table in (store, dataset):
        table.erase([secret], reason="ticket 7")
        assert secret not in known_to(table.uri)
    assert dataset.snapshot().num_examples == sum(
        e["user_id"] != secret for e in events_of_day(events, 2)
    )
    assert dataset.snapshot().verify(deep=True).ok


def known_to(uri: str) -> set[str]:
    """Every user id in any Parquet file, footer index or sidecar below a folder, live or not."""
    found: set[str] = set()
    for path in Path(uri).rglob("*"):
        if path.suffix == ".parquet" and "_delta_log" not in path.parts:
            file = pq.ParquetFile(path)
            found.update(file.read(["user_id"])["user_id"].to_pylist())
            index = decode_users(file.metadata.metadata[b"vlm.users"], Stripes())
            found.update(index.user_ids.to_pylist())
        elif path.suffix == ".arrow":
            found.update(pa.ipc.open_stream(path).read_all()["user_id"].to_pylist())
    return found


def test_sealing_again_is_the_same_window_with_and_without_them(tmp_path: Path) -> None:
    store = history_of(tmp_path / "h", EVENTS)
    erase(store, [3, 5])
    whole = events_of_day(EVENTS, 1)
    without = [e for e in whole if e["user_id"] not in (3, 5)]
    for events in (whole, without):
        assert store.seal(day(1), event_table(events, store.group)).reused
    with pytest.raises(WindowSealedError):
        store.seal(day(1), event_table(without[1:], store.group))
    assert_only(store, EVENTS, {3, 5})


def test_a_window_from_before_cannot_bring_them_back(tmp_path: Path) -> None:
    store = history_of(tmp_path / "h", EVENTS, days=[0, 2, 3])
    staged = store.stage(day(1), event_table(events_of_day(EVENTS, 1), store.group))
    erase(store, [3, 77])
    for seal in (
        lambda: store.seal(day(1), event_table(events_of_day(EVENTS, 1), store.group)),
        lambda: store.commit(staged),
    ):
        with pytest.raises(InvalidEventsError, match=r"were erased.*Remove their rows"):
            seal()
    rest = [e for e in events_of_day(EVENTS, 1) if e["user_id"] != 3]
    store.seal(day(1), event_table(rest, store.group))
    assert store.snapshot().verify(deep=True).ok


def test_who_comes_back_later_goes_on_where_the_history_ended(tmp_path: Path) -> None:
    store = history_of(tmp_path / "h", EVENTS)
    before = len(histories(EVENTS)[3])
    erase(store, [3])
    later = [
        {**EVENTS[0], "user_id": 3, "event_id": 9_000 + i, "available_at": at(4, i)}
        for i in range(5)
    ]
    store.seal(day(4), event_table(later, store.group))
    read = store.snapshot().read([3], Projection(["event_id"]))
    assert read.end_positions.tolist() == [before + 5]
    assert read.columns["event_id"].to_pylist() == [9_000, 9_001, 9_002, 9_003, 9_004]
    requests = pa.table({"user_id": [3, 3], "event_id": [9_003, 9_000]})
    dataset = PointerDataset.create(tmp_path / "p", ["ratings"])
    dataset.seal(day(4), requests, {"ratings": store.snapshot()})
    found = {
        int(b.examples["request_id"][0]): b.sequences["ratings"].values["event_id"].tolist()
        for b in SequenceLoader(dataset.ref(), {"ratings": Projection(["event_id"])}, 1)
    }
    assert found == {9_003: [9_000, 9_001, 9_002], 9_000: []}
    _, num_rows = erase(store, [3])
    assert num_rows == 5
    assert store.snapshot().count([3]).tolist() == [before + 5]
    assert [one.id.partition(".")[2] for one in store.snapshot().removals] == ["1", "2"]


def examples_of(events: list[dict], number: int) -> pa.Table:
    some = events_of_day(events, number)
    return pa.table(
        {"user_id": [e["user_id"] for e in some], "event_id": [e["event_id"] for e in some]}
    )


def loaded(dataset: PointerDataset, **options: object) -> tuple[dict, int]:
    loader = SequenceLoader(dataset.ref(), {"ratings": Projection(NAMES[:3])}, 16, **options)
    found = {}
    for batch in loader:
        sequence = batch.sequences["ratings"]
        for row in range(batch.batch_size):
            low, high = sequence.offsets[row], sequence.offsets[row + 1]
            values = {name: v[low:high].tolist() for name, v in sequence.values.items()}
            key = (int(batch.examples["user_id"][row]), int(batch.examples["request_id"][row]))
            found[key] = values
    return found, loader.num_dropped


@pytest.mark.parametrize("max_length", [None, 6])
@pytest.mark.parametrize("order", ["stored", "shuffled", "time"])
def test_pointers_fail_or_are_dropped_and_counted(
    tmp_path: Path, order: str, max_length: int | None
) -> None:
    store = history_of(tmp_path / "h", EVENTS)
    dataset = PointerDataset.create(tmp_path / "p", ["ratings"], max_length=max_length)
    for number in (1, 2, 3):
        snapshot = store.snapshot(store.version_covering(day(number)))
        dataset.seal(day(number), examples_of(EVENTS, number), {"ratings": snapshot})
    before, dropped = loaded(dataset, order=order)
    assert dropped == 0
    erase(store, [0, 7])
    with pytest.raises(GoneError, match=r"examples point at events.*gone='drop'"):
        loaded(PointerDataset.open(dataset.uri), order=order)
    after, dropped = loaded(dataset, order=order, gone="drop")
    # An empty sequence needs nothing that is gone.
    expected = {
        key: values
        for key, values in before.items()
        if key[0] not in (0, 7) or not values["item_id"]
    }
    assert after == expected
    assert dropped == len(before) - len(expected) > 0


def test_a_loader_state_from_before_is_refused_only_if_examples_were_dropped(
    tmp_path: Path,
) -> None:
    from vlm_dagster.errors import PinError

    store = history_of(tmp_path / "h", EVENTS)
    dataset = PointerDataset.create(tmp_path / "p", ["ratings"])
    some = [e for e in EVENTS if e["user_id"] != 9]
    dataset.seal(day(1), examples_of(some, 1), {"ratings": store.snapshot()})

    def loader() -> SequenceLoader:
        return SequenceLoader(dataset.ref(), {"ratings": Projection(["item_id"])}, 16, gone="drop")

    state = loader().state_dict()
    erase(store, [9])
    loader().load_state_dict(state)
    erase(store, [7])
    with pytest.raises(PinError, match="loader state"):
        loader().load_state_dict(state)


def test_counting_says_what_would_leave(tmp_path: Path) -> None:
    store = history_of(tmp_path / "h", EVENTS)
    truth = histories(EVENTS)
    files = files_below(store.uri)
    planned = store.erase([5, 3, 99, 3], reason="ticket 7", dry_run=True)
    assert (planned.num_users, planned.num_rows) == (3, len(truth[3]) + len(truth[5]))
    assert files_below(store.uri) == files
    done = store.erase([5, 3, 99, 3], reason="ticket 7")
    assert (done.num_users, done.num_rows) == (planned.num_users, planned.num_rows)
    assert done.segments == planned.segments
    assert done.num_files_deleted >= len(done.segments)
    (removal,) = store.snapshot().removals
    assert (removal.reason, removal.num_users, removal.num_rows, removal.through) == (
        "ticket 7",
        3,
        done.num_rows,
        day(3),
    )


@pytest.mark.parametrize(
    ("users", "reason", "match"),
    [
        ([], "x", "no user"),
        ([1], " ", "without a reason"),
        (["a"], "x", "no user ids"),
        ([None], "x", "null"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, users: list, reason: str, match: str
) -> None:
    store = history_of(tmp_path / "h", EVENTS)
    with pytest.raises(SchemaError, match=match):
        store.erase(users, reason=reason)
    assert store.snapshot().removals == ()


def test_a_reader_of_an_old_version_opens_its_pin_again(tmp_path: Path) -> None:
    store = history_of(tmp_path / "h", EVENTS)
    pins = [store.snapshot(store.version_covering(day(n))).ref() for n in range(4)]
    before = [pin.open().read(USERS, Projection(NAMES)) for pin in pins]
    store.compact(fanout=2)
    store.erase([3], reason="ticket 7")
    for pin, old in zip(pins, before, strict=True):
        new = pin.open().read(USERS, Projection(NAMES))
        for row, user in enumerate(USERS):
            if user != 3:
                assert new.of(row) == old.of(row)
                assert new.end_positions[row] == old.end_positions[row]
            else:
                assert new.lengths[row] == 0


def test_a_ledger_of_a_later_release_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_dagster.sealed import gone

    store = history_of(tmp_path / "h", EVENTS)
    with monkeypatch.context() as later:
        later.setattr(gone, "_FORMAT", 2)
        store.erase([3], reason="ticket 7")
    with pytest.raises(TableError, match=r"_gone/.* has format 2, newer.*Upgrade"):
        HistoryStore.open(store.uri).snapshot().read([4])


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_ledger_is_named(tmp_path: Path, damage: str) -> None:
    store = history_of(tmp_path / "h", EVENTS)
    store.erase([3], reason="ticket 7")
    paths = set(store._table.state().gone.buckets.values())
    for path in (Path(store.uri, path) for path in paths):
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CorruptFileError, match=r"_gone/.*(is missing|not to its name)"):
        HistoryStore.open(store.uri).snapshot().read(USERS)
