"""Erasing, dropping and correcting: killed at any step, or refused by storage, they lose nothing, and
calling them again finishes what they began."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from reference import histories
from strategies import day, event_table, events_of_day, files_below, history_of, many_events

from vlm_dagster import HistoryStore, Projection
from vlm_dagster.errors import StorageError
from vlm_dagster.storage import LocalStorage

EVENTS = many_events(seed=21, num_events=900, num_users=12, num_days=6)
DAYS = range(6)
USERS = list(range(13))
ERASED = [2, 5]
# A correction of day 2: every other event of it.
CORRECTED = [e for e in EVENTS if e not in events_of_day(EVENTS, 2) or e["event_id"] % 2]
DROPPED = {e["event_id"] for n in (0, 1) for e in events_of_day(EVENTS, n)}

ACT = """
import sys
import pyarrow as pa
from vlm_dagster import HistoryStore
from vlm_dagster.history.erasure import erase_rows
def act(uri, action):
    store = HistoryStore.open(uri)
    if action == "erase":
        erase_rows(store._table, pa.array([2, 5]), "asked for")
    elif action == "drop":
        store.drop_before("1997-09-22", reason="old")
    else:
        import pyarrow.parquet as pq
        store.correct("1997-09-22", pq.read_table(uri + ".day.parquet"), reason="wrong")
"""
CHILD = (
    ACT
    + """
import os, time
from vlm_dagster.history import correction, dropping, erasure, rewrite
from vlm_dagster.sealed import gone
from vlm_dagster.storage import LocalStorage
uri, action, stop, number = sys.argv[1:]
def stop_at(owner, name, before):
    original, calls = getattr(owner, name), [0]
    def stopping(*args, **kwargs):
        calls[0] += 1
        last = calls[0] == int(number)
        found = None if before and last else original(*args, **kwargs)
        if last:
            os.write(1, b"stopped\\n")
            time.sleep(600)
        return found
    setattr(owner, name, stopping)
module = {"erase": erasure, "drop": dropping, "correct": correction}[action]
place, _, when = stop.partition(" ")
owner, name = {
    "write": (rewrite, "_write"),
    "put": (LocalStorage, "put"),
    "proof": (rewrite, "_read_back"),
    "sidecar": (gone, "put_sidecar"),
    "commit": (module, "commit_layout"),
}[place]
stop_at(owner, name, when != "after")
act(uri, action)
os.write(1, b"finished\\n")
"""
)
STOPS = [
    ("erase", "write", 1), ("erase", "put", 1), ("erase", "put after", 2), ("erase", "proof", 2),
    ("erase", "sidecar", 1), ("erase", "sidecar after", 3), ("erase", "commit", 1),
    ("erase", "commit after", 1), ("erase", "commit after", 2), ("erase", "commit", 4),
    ("drop", "sidecar", 1), ("drop", "sidecar after", 2), ("drop", "commit", 1),
    ("drop", "commit after", 1),
    ("correct", "put", 1), ("correct", "write", 2), ("correct", "put after", 3),
    ("correct", "proof", 1), ("correct", "commit", 1), ("correct", "commit after", 1),
]  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> HistoryStore:
    import pyarrow.parquet as pq

    store = history_of(tmp_path / "h", EVENTS, days=DAYS)
    store.compact(fanout=2, max_windows=2)
    table = event_table(events_of_day(CORRECTED, 2), store.group)
    pq.write_table(table, f"{store.uri}.day.parquet")
    return store


def act(store: HistoryStore, action: str) -> None:
    scope: dict[str, Callable] = {}
    exec(ACT, scope)
    scope["act"](store.uri, action)


def ids(store: HistoryStore) -> dict[int, tuple[int, list[int]]]:
    """Every user's end position and events, proved against the digests."""
    snapshot = HistoryStore.open(store.uri).snapshot()
    assert snapshot.verify(deep=True).ok
    read = snapshot.read(USERS, Projection(["event_id"]))
    return {
        user: (int(read.end_positions[row]), read.of(row)["event_id"].to_pylist())
        for row, user in enumerate(USERS)
    }


def finished(action: str) -> dict[int, tuple[int, list[int]]]:
    truth = histories(CORRECTED if action == "correct" else EVENTS)
    found = {}
    for user in USERS:
        events = [e["event_id"] for e in truth.get(user, [])]
        left = events
        if action == "erase" and user in ERASED:
            left = []
        if action == "drop":
            left = [e for e in events if e not in DROPPED]
        found[user] = (len(events), left)
    return found


def assert_on_the_way(store: HistoryStore, before: dict, action: str) -> None:
    """Everybody is as before or as after; of an erased user the beginning may be gone."""
    after = finished(action)
    found = ids(store)
    if action == "erase":
        for user, (end, left) in found.items():
            assert end == before[user][0]
            if user in ERASED:
                assert left == before[user][1][len(before[user][1]) - len(left) :]
            else:
                assert left == before[user][1]
    else:
        assert found in (before, after)


@pytest.mark.parametrize(("action", "stop", "number"), STOPS)
def test_killed_anywhere_it_is_finished_by_the_next_call(
    store: HistoryStore, action: str, stop: str, number: int
) -> None:
    before = ids(store)
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, store.uri, action, stop, str(number)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "stopped\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert_on_the_way(store, before, action)
    act(store, action)
    assert ids(store) == finished(action)
    removals = HistoryStore.open(store.uri).snapshot().removals
    assert [one.done for one in removals] == [True] * (action != "correct")
    HistoryStore.open(store.uri).sweep(older_than_s=0, dry_run=False)
    assert ids(store) == finished(action)
    assert not any(path.startswith("_staging/") for path in files_below(store.uri))


@pytest.mark.parametrize("action", ["erase", "drop", "correct"])
def test_storage_that_fails_leaves_a_state_to_go_on_from(
    store: HistoryStore, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every write fails once, in turn; each time somebody calls again."""
    before = ids(store)
    put, put_new = LocalStorage.put, LocalStorage.put_new
    calls = [0, 0]

    def failing(original: Callable) -> Callable:
        def call(self: LocalStorage, data: object, path: str) -> object:
            calls[0] += 1
            if calls[0] == calls[1]:
                error = OSError(28, "No space left on device")
                raise StorageError(self.uri, f"writing {path}", error)
            return original(self, data, path)

        return call

    monkeypatch.setattr(LocalStorage, "put", failing(put))
    monkeypatch.setattr(LocalStorage, "put_new", failing(put_new))
    for fail_at in range(1, 40):
        calls[:] = [0, fail_at]
        problem = ""
        try:
            act(store, action)
        except StorageError as error:
            problem = str(error)
        if not problem:
            break
        assert "No space left" in problem
        assert_on_the_way(store, before, action)
    assert fail_at > 2
    calls[1] = 0
    act(store, action)
    assert ids(store) == finished(action)


def test_erasers_compactors_and_a_sealer_race(tmp_path: Path) -> None:
    store = history_of(tmp_path / "h", EVENTS, days=range(4))
    compact = "HistoryStore.open(sys.argv[1]).compact(fanout=2)"
    seal = f"""
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_removal_crashes import EVENTS, day, event_table, events_of_day
store = HistoryStore.open(sys.argv[1])
for number in (4, 5):
    events = [e for e in events_of_day(EVENTS, number) if e["user_id"] not in (2, 5)]
    store.seal(day(number), event_table(events, store.group))
"""
    programs = [f"{ACT}\nact(sys.argv[1], 'erase')"] * 2 + [f"{ACT}\n{compact}", f"{ACT}\n{seal}"]
    processes = [subprocess.Popen([sys.executable, "-c", p, store.uri]) for p in programs]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0, 0]
    truth = histories(EVENTS)
    for user, (end, left) in ids(store).items():
        if user in ERASED:
            assert left == []
            assert end == sum(
                e["user_id"] == user for n in range(4) for e in events_of_day(EVENTS, n)
            )
        else:
            assert left == [e["event_id"] for e in truth.get(user, [])]
    removals = HistoryStore.open(store.uri).snapshot().removals
    assert all(one.done for one in removals)
    assert day(5) in {one.window.key for one in HistoryStore.open(store.uri).snapshot().windows}
