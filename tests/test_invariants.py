"""What must always hold (docs/design.md, section 3), over odd histories, against the reference."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import checksum, fat_rows, histories
from strategies import (
    TRAIT_NAMES,
    at,
    day,
    event_lists,
    event_table,
    events_of_day,
    few,
    group_of,
    history_of,
    integer_ids,
    many_events,
    request_lists,
    request_table,
    seal_days,
    string_ids,
)

from vlm_dagster import HistoryStore, PointerDataset, Projection, Snapshot
from vlm_dagster.errors import WindowSealedError
from vlm_dagster.pointers import PointerSnapshot

ALL = Projection(["event_id", "event_time", "available_at", *TRAIT_NAMES])

either_ids = st.sampled_from([integer_ids, string_ids])
any_events = st.tuples(either_ids, either_ids).flatmap(lambda ids: event_lists(*ids))


def values(column: pa.Array) -> list:
    """Python values, times as integers."""
    return (column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column).to_pylist()


def rows_of(columns: dict[str, pa.Array]) -> list[tuple]:
    return list(zip(*(values(column) for column in columns.values()), strict=True))


def expected_rows(sequence: list[dict], names: tuple[str, ...] = ALL.traits or ()) -> list[tuple]:
    return [tuple(event[name] for name in names) for event in sequence]


def history_rows(snapshot: Snapshot, user: object) -> list[tuple]:
    array = pa.array([user], snapshot.group.user_id)
    return rows_of(snapshot.read(array, ALL).of(0))


def rebuilt(pointers: PointerSnapshot, snapshot: Snapshot) -> dict[object, list[tuple]]:
    """Request id -> the sequence behind its pointer: `[end_position - length, end_position)`."""
    found = {}
    for example in pointers.to_table().to_pylist():
        whole = history_rows(snapshot, example["user_id"])
        end, length = example["ratings_end_position"], example["ratings_length"]
        found[example["user_id"], example["request_id"]] = whole[end - length : end]
    return found


# -- 1: stored once -------------------------------------------------------------------------------


@few(8)
@given(any_events)
def test_every_event_is_stored_exactly_once(events: list[dict]) -> None:
    with TemporaryDirectory() as folder:
        snapshot = history_of(folder, events).snapshot()
        files = snapshot.files()
        assert sum(files["num_rows"].to_pylist()) == len(events) == snapshot.num_events
        stored = [
            (user, event_id)
            for users, ids in zip(
                snapshot.column_chunks("user_id"), snapshot.column_chunks("event_id"), strict=True
            )
            for user, event_id in zip(users.to_pylist(), ids.to_pylist(), strict=True)
        ]
        assert sorted(stored) == sorted((e["user_id"], e["event_id"]) for e in events)
        assert snapshot.verify(deep=True).problems == ()


@few(8)
@given(any_events)
def test_histories_come_back_whole_and_in_order(events: list[dict]) -> None:
    with TemporaryDirectory() as folder:
        snapshot = history_of(folder, events).snapshot()
        expected = histories(events)
        assert snapshot.user_ids().to_pylist() == sorted(expected)
        for user, history in expected.items():
            assert history_rows(snapshot, user) == expected_rows(history)


# -- 2: sealed means sealed -----------------------------------------------------------------------


@few(6)
@given(any_events, st.randoms(use_true_random=False))
def test_sealing_again_changes_nothing(events: list[dict], rng: random.Random) -> None:
    with TemporaryDirectory() as folder:
        store = history_of(folder, events)
        before = store.snapshot()
        for number in range(4):
            shuffled = events_of_day(events, number)
            rng.shuffle(shuffled)
            again = store.seal(day(number), event_table(shuffled, store.group))
            assert again.reused
            assert again.version == number + 1
        assert store.snapshot().ref() == before.ref()


@few(6)
@given(any_events.filter(len), st.data())
def test_other_content_for_a_sealed_window_is_refused(
    events: list[dict], data: st.DataObject
) -> None:
    with TemporaryDirectory() as folder:
        store = history_of(folder, events)
        before = store.snapshot().ref()
        victim = data.draw(st.sampled_from(events))
        number = (victim["available_at"] - at(0)) // (at(1) - at(0))
        changed = [
            {**e, "liked": not e["liked"]} if e is victim else e
            for e in events_of_day(events, number)
        ]
        with pytest.raises(WindowSealedError) as caught:
            store.seal(day(number), event_table(changed, store.group))
        assert caught.value.sealed in str(caught.value)
        assert caught.value.offered in str(caught.value)
        assert store.snapshot().ref() == before


# -- 3 and 4: prefix, no leakage ------------------------------------------------------------------


@few(10)
@given(any_events, st.data(), st.sampled_from([None, 1, 3]), st.sampled_from([1, 2, 3]))
def test_requests_at_any_instant_give_the_reference(
    events: list[dict], data: st.DataObject, max_length: int | None, num_buckets: int
) -> None:
    requests = data.draw(request_lists(events))
    expected = fat_rows(events, requests, max_length)
    with TemporaryDirectory() as folder:
        store = history_of(f"{folder}/history", events)
        dataset = PointerDataset.create(
            f"{folder}/pointers",
            ["ratings"],
            request="request_time",
            max_length=max_length,
            user_id=store.group.user_id,
            num_buckets=num_buckets,
        )
        for number in range(4):
            asked = [r for r in requests if at(number) <= r["request_time"] < at(number + 1)]
            snapshot = store.snapshot(store.version_covering(day(number)))
            names = ["user_id", "request_id", "request_time"]
            table = request_table(asked, store.group.user_id, names, pa.int64())
            sealed = dataset.seal(day(number), table, {"ratings": snapshot})
            assert sealed.num_events == len(asked)
        found = rebuilt(dataset.snapshot(), store.snapshot())
        assert len(found) == len(expected)
        stored = {e["request_id"]: e for e in dataset.snapshot().to_table().to_pylist()}
        for row in expected:
            assert found[row["user_id"], row["request_id"]] == expected_rows(row["sequence"])
            assert all(e["available_at"] < row["request_time"] for e in row["sequence"])
            example = stored[row["request_id"]]
            assert example["ratings_end_position"] == row["end_position"]
            assert example["ratings_length"] == len(row["sequence"])
            first = row["end_position"] - len(row["sequence"])
            ids = [e["event_id"] for e in row["sequence"]]
            assert example["ratings_checksum"] == checksum(ids, first)


@few(10)
@given(any_events, st.sampled_from([None, 1, 3]), st.sampled_from([1, 2, 3]))
def test_an_event_to_be_predicted_is_never_in_its_own_history(
    events: list[dict], max_length: int | None, num_buckets: int
) -> None:
    expected = fat_rows(
        events, [{"user_id": e["user_id"], "event_id": e["event_id"]} for e in events], max_length
    )
    with TemporaryDirectory() as folder:
        store = history_of(f"{folder}/history", events)
        dataset = PointerDataset.create(
            f"{folder}/pointers",
            ["ratings"],
            max_length=max_length,
            user_id=store.group.user_id,
            request_id=store.group.event_id,
            num_buckets=num_buckets,
        )
        for number in range(4):
            asked = events_of_day(events, number)
            names = ["user_id", "event_id"]
            table = request_table(asked, store.group.user_id, names, store.group.event_id)
            dataset.seal(day(number), table, {"ratings": store.snapshot()})
        found = rebuilt(dataset.snapshot(), store.snapshot())
        assert len(found) == len(events)
        for row in expected:
            sequence = found[row["user_id"], row["event_id"]]
            assert sequence == expected_rows(row["sequence"])
            ids = [event_id for event_id, *_ in sequence]
            assert row["event_id"] not in ids


# -- 5: exact replay ------------------------------------------------------------------------------


@few(8)
@given(any_events, st.permutations(range(4)), st.randoms(use_true_random=False))
def test_the_way_of_sealing_leaves_no_trace(
    events: list[dict], order: list[int], rng: random.Random
) -> None:
    with TemporaryDirectory() as folder:
        plain = history_of(f"{folder}/plain", events, num_buckets=2).snapshot()
        shuffled = list(events)
        rng.shuffle(shuffled)
        store = HistoryStore.create(f"{folder}/other", group_of(events), 5, start=day(0))
        for number in order:  # other windows first, other rows first, one row a batch
            table = event_table(events_of_day(shuffled, number), store.group)
            store.seal(day(number), table.to_reader(max_chunksize=rng.choice([1, 3, 100])))
        other = store.snapshot()
        assert other.digest == plain.digest
        assert other.watermark_us == plain.watermark_us
        for user in histories(events):
            assert history_rows(other, user) == history_rows(plain, user)


@few(6)
@given(any_events)
def test_a_pin_reads_the_same_after_later_commits(events: list[dict]) -> None:
    with TemporaryDirectory() as folder:
        store = history_of(folder, events, days=[0, 1])
        pin = store.snapshot().ref()
        before = {user: history_rows(pin.open(), user) for user in histories(events)}
        seal_days(store, events, [2, 3])
        replayed = pickle.loads(pickle.dumps(pin)).open()
        assert {user: history_rows(replayed, user) for user in histories(events)} == before
        newer = store.snapshot()
        assert newer.digest_at(pin.watermark_us) == pin.digest
        for user, rows in before.items():
            assert history_rows(newer, user)[: len(rows)] == rows


IN_ANOTHER_PROCESS = """
import pickle, sys
pin, pointers = pickle.load(sys.stdin.buffer)
snapshot, examples = pin.open(), pointers.open()
read = snapshot.read(snapshot.user_ids())
out = (read.offsets.tobytes(), {n: c.to_pylist() for n, c in read.columns.items()},
       examples.to_table().to_pylist())
sys.stdout.buffer.write(pickle.dumps(out))
"""


def test_another_process_reads_the_same_bytes(tmp_path: Path) -> None:
    events = many_events(seed=1, num_events=2_000, num_users=40)
    store = history_of(tmp_path / "history", events)
    dataset = PointerDataset.create(tmp_path / "pointers", ["ratings"], num_buckets=3)
    for number in range(4):
        names = ["user_id", "event_id"]
        table = request_table(events_of_day(events, number), pa.int64(), names, pa.int64())
        dataset.seal(day(number), table, {"ratings": store.snapshot()})
    pins = (store.snapshot().ref(), dataset.ref())
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", IN_ANOTHER_PROCESS],
        input=pickle.dumps(pins),
        capture_output=True,
        check=True,
    )
    offsets, columns, examples = pickle.loads(result.stdout)
    here = store.snapshot().read(store.snapshot().user_ids())
    assert offsets == here.offsets.tobytes()
    assert columns == {name: column.to_pylist() for name, column in here.columns.items()}
    assert examples == dataset.snapshot().to_table().to_pylist()


# -- 7: projection is only projection -------------------------------------------------------------


@few(10)
@given(any_events, st.lists(st.sampled_from(ALL.traits), unique=True), st.data())
def test_a_projection_is_a_slice_of_the_whole(
    events: list[dict], names: list[str], data: st.DataObject
) -> None:
    users = sorted(histories(events))
    stranger = "nobody" if users and isinstance(users[0], str) else 424242
    asked = data.draw(st.lists(st.sampled_from([*users, stranger]), max_size=6))
    max_length = data.draw(st.sampled_from([None, 0, 1, 2, 1000]))
    with TemporaryDirectory() as folder:
        snapshot = history_of(folder, events).snapshot()
        found = snapshot.read(
            pa.array(asked, snapshot.group.user_id), Projection(names, max_length)
        )
        assert list(found.columns) == names
        assert found.user_ids.to_pylist() == asked
        for row, user in enumerate(asked):
            history = histories(events).get(user, [])
            start = 0 if max_length is None else max(len(history) - max_length, 0)
            newest = history[start:]
            part = found.of(row)
            assert [values(part[name]) for name in names] == [[e[n] for e in newest] for n in names]
            assert found.lengths[row] == len(newest)
            assert found.end_positions[row] == len(history)


# -- big ones, by hand ----------------------------------------------------------------------------


def test_a_user_with_seventy_thousand_events_beside_users_with_one(tmp_path: Path) -> None:
    long = [
        {
            "user_id": 7,
            "event_id": n,
            "event_time": at(n // 60_000, n),
            "available_at": at(n // 60_000, (n % 60_000) // 3),
            "item_id": n % 97,
            "rating": 1.0,
            "title": "x",
            "liked": n % 2 == 0,
        }
        for n in range(70_000)
    ]
    short = [{**long[n], "user_id": 1_000 + n, "event_id": 1_000_000 + n} for n in range(20)]
    events = [*long, *short]
    random.Random(0).shuffle(events)
    store = history_of(tmp_path / "history", events, days=[0, 1, 2, 3], num_buckets=1)
    snapshot = store.snapshot()
    history = histories(events)[7]
    read = snapshot.read([1_003, 7, 5, 7], Projection(["event_id", "item_id"], max_length=65_000))
    assert read.lengths.tolist() == [1, 65_000, 0, 65_000]
    assert read.of(1)["event_id"].to_pylist() == [e["event_id"] for e in history[-65_000:]]
    assert read.of(3) == read.of(1)
    dataset = PointerDataset.create(tmp_path / "pointers", ["ratings"], max_length=50_000)
    asked = [e for e in events_of_day(long, 1) if e["event_id"] % 997 == 0]
    names = ["user_id", "event_id"]
    table = request_table(asked, pa.int64(), names, pa.int64())
    dataset.seal(day(1), table, {"ratings": snapshot})
    stored = {e["request_id"]: e for e in dataset.snapshot().to_table().to_pylist()}
    for row in fat_rows(events, [{"user_id": 7, "event_id": e["event_id"]} for e in asked], 50_000):
        example = stored[row["event_id"]]
        first = row["end_position"] - len(row["sequence"])
        assert example["ratings_end_position"] == row["end_position"]
        ids = [e["event_id"] for e in row["sequence"]]
        assert example["ratings_checksum"] == checksum(ids, first)


def test_histories_with_gaps_of_many_windows(tmp_path: Path) -> None:
    base = many_events(seed=3, num_events=60, num_users=3, num_days=2)
    late = [
        {
            **e,
            "event_id": 1_000 + e["event_id"],
            "available_at": e["available_at"] + 40 * (at(1) - at(0)),
        }
        for e in base
    ]
    events = [*base, *late]
    snapshot = history_of(tmp_path, events, days=range(42)).snapshot()
    assert len(snapshot.windows) == 42
    assert sum(w.num_events == 0 for w in snapshot.windows) == 38
    for user, history in histories(events).items():
        assert history_rows(snapshot, user) == expected_rows(history)


def test_a_snapshot_shows_nothing_past_a_gap(tmp_path: Path) -> None:
    events = many_events(seed=4, num_events=200, num_users=5)
    store = history_of(tmp_path, events, days=[0, 2, 3])
    first_day = events_of_day(events, 0)
    snapshot = store.snapshot()
    assert snapshot.watermark_us == at(1)
    for user, history in histories(first_day).items():
        assert history_rows(snapshot, user) == expected_rows(history)
    seal_days(store, events, [1])
    assert store.snapshot().watermark_us == at(4)
    for user, history in histories(events).items():
        assert history_rows(store.snapshot(), user) == expected_rows(history)
