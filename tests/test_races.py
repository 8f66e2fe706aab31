"""Many processes at once: the Delta log lets exactly one through, and everybody ends well."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from strategies import at, day, event_table, events_of_day, group_of, many_events

from vlm_dagster import HistoryStore, Sealed
from vlm_dagster.errors import TableError, VlmError, WindowSealedError

NUM_PROCESSES = 8
EVENTS = many_events(seed=0, num_events=400, num_users=20)
GROUP = group_of(EVENTS)

_barrier: Barrier


def _ready(barrier: Barrier) -> None:
    global _barrier  # a barrier reaches a spawned process only when it starts
    _barrier = barrier
    # What importing and connecting for the first time costs must not spread the start.
    import duckdb

    duckdb.connect().close()


def _at_once(job: Callable[..., object], *args: object) -> object:
    try:
        return job(*args)
    except VlmError as error:
        return error


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(NUM_PROCESSES)
    with ProcessPoolExecutor(NUM_PROCESSES, context, _ready, (barrier,)) as pool:
        yield pool


def race(pool: ProcessPoolExecutor, job: Callable[..., object], args: list[tuple]) -> list[object]:
    """What each process returned or raised; they start together."""
    assert len(args) == NUM_PROCESSES
    return list(pool.map(_at_once, [job] * len(args), *zip(*args, strict=True), timeout=120))


def _seal(uri: str, key: str, table: pa.Table) -> Sealed:
    store = HistoryStore.open(uri)
    _barrier.wait(60)
    return store.seal(key, table)


def _stage_then_commit(uri: str, key: str, table: pa.Table) -> Sealed:
    """The narrowest race: everybody has staged before anybody commits."""
    store = HistoryStore.open(uri)
    staged = store.stage(key, table)
    _barrier.wait(60)
    return store.commit(staged)


def _create(uri: str, num_buckets: int) -> str:
    _barrier.wait(60)
    return HistoryStore.create(uri, GROUP, num_buckets).table_id


def num_commits(uri: Path) -> int:
    return int(DeltaTable(str(uri)).version())


def live_files(uri: Path) -> int:
    return len(DeltaTable(str(uri)).file_uris())


@pytest.mark.parametrize("job", [_seal, _stage_then_commit])
def test_the_same_content_from_all_is_committed_once(
    tmp_path: Path, processes: ProcessPoolExecutor, job: Callable
) -> None:
    HistoryStore.create(tmp_path, GROUP, 4)
    table = event_table(events_of_day(EVENTS, 0), GROUP)
    outcomes = race(processes, job, [(str(tmp_path), day(0), table)] * NUM_PROCESSES)
    assert all(isinstance(outcome, Sealed) for outcome in outcomes), outcomes
    assert sorted(outcome.reused for outcome in outcomes) == [False] + [True] * 7
    assert {(outcome.version, outcome.num_events) for outcome in outcomes} == {(1, table.num_rows)}
    assert num_commits(tmp_path) == 1
    snapshot = HistoryStore.open(tmp_path).snapshot()
    assert snapshot.num_events == sum(snapshot.files()["num_rows"].to_pylist()) == table.num_rows
    assert snapshot.verify(deep=True).problems == ()


@pytest.mark.parametrize("job", [_seal, _stage_then_commit])
def test_of_different_contents_exactly_one_wins(
    tmp_path: Path, processes: ProcessPoolExecutor, job: Callable
) -> None:
    HistoryStore.create(tmp_path, GROUP, 4)
    events = events_of_day(EVENTS, 0)
    tables = [event_table(events[: len(events) - n], GROUP) for n in range(NUM_PROCESSES)]
    outcomes = race(processes, job, [(str(tmp_path), day(0), table) for table in tables])
    winners = [outcome for outcome in outcomes if isinstance(outcome, Sealed)]
    losers = [outcome for outcome in outcomes if isinstance(outcome, WindowSealedError)]
    assert (len(winners), len(losers)) == (1, 7), outcomes
    assert {loser.sealed for loser in losers} == {winners[0].digest}
    assert winners[0].digest not in {loser.offered for loser in losers}
    assert num_commits(tmp_path) == 1
    store = HistoryStore.open(tmp_path)
    assert store.snapshot().num_events == tables[outcomes.index(winners[0])].num_rows
    assert store.snapshot().verify(deep=True).problems == ()
    # The losers' files are in place but named by no commit: sweeping takes them, and only them.
    live = live_files(tmp_path)
    store.sweep(older_than_s=0, dry_run=False)
    assert store.sweep(older_than_s=0) == []
    assert len(list(tmp_path.rglob("bucket=*/*.parquet"))) == live
    assert store.snapshot().verify(deep=True).problems == ()


@pytest.mark.parametrize("start", [day(0), None], ids=["declared start", "no declared start"])
def test_different_windows_all_get_sealed_or_say_why_not(
    tmp_path: Path, processes: ProcessPoolExecutor, start: str | None
) -> None:
    HistoryStore.create(tmp_path, GROUP, 4, start=start)
    tables = [
        event_table(
            [
                {**e, "available_at": e["available_at"] + at(n) - at(0)}
                for e in events_of_day(EVENTS, 0)
            ],
            GROUP,
        )
        for n in range(NUM_PROCESSES)
    ]
    outcomes = race(
        processes,
        _stage_then_commit,
        [(str(tmp_path), day(n), table) for n, table in enumerate(tables)],
    )
    sealed = [outcome for outcome in outcomes if isinstance(outcome, Sealed)]
    assert num_commits(tmp_path) == len(sealed)
    assert sorted(outcome.version for outcome in sealed) == list(range(1, len(sealed) + 1))
    snapshot = HistoryStore.open(tmp_path).snapshot()
    assert snapshot.num_events == len(sealed) * tables[0].num_rows
    assert len(snapshot.windows) == len(sealed)
    assert snapshot.verify(deep=True).problems == ()
    if start is not None:
        assert len(sealed) == NUM_PROCESSES
    else:
        # Whichever was first is the first window; those before it are refused, those after it not.
        first = min(sealed, key=lambda s: s.version).window
        assert {outcome.window.index for outcome in sealed} == set(
            range(first.index, first.index + len(sealed))
        )
        refused = [outcome for outcome in outcomes if not isinstance(outcome, Sealed)]
        assert all(f"before the first window {first.key}" in str(error) for error in refused)


def test_all_may_create_the_table_at_once(tmp_path: Path, processes: ProcessPoolExecutor) -> None:
    outcomes = race(processes, _create, [(str(tmp_path / "new"), 4)] * NUM_PROCESSES)
    assert len(set(outcomes)) == 1, outcomes
    assert num_commits(tmp_path / "new") == 0


def test_of_different_declarations_one_is_created(
    tmp_path: Path, processes: ProcessPoolExecutor
) -> None:
    outcomes = race(
        processes, _create, [(str(tmp_path / "new"), 1 + n) for n in range(NUM_PROCESSES)]
    )
    assert sum(isinstance(outcome, TableError) for outcome in outcomes) == 7, outcomes
    assert num_commits(tmp_path / "new") == 0
