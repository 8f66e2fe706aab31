"""Arenas: filled piece by piece, by any number of threads, into memory that is used again."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import histories
from strategies import TRAIT_NAMES, few, history_of, many_events

from vlm_dagster import HistoryStore, Projection
from vlm_dagster.history import ArenaBuffers, Histories, filling
from vlm_dagster.history import buffers as buffers_module
from vlm_dagster.sealed import gathering, reader, stripes
from vlm_dagster.sealed.gathering import Placement, gather, width_of

EVENTS = many_events(seed=11, num_events=3_000, num_users=60)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> HistoryStore:
    with pytest.MonkeyPatch.context() as patch:
        # Many row groups, so that users' rows lie in several of them and several are read at once.
        patch.setattr(stripes, "_GROUP_ROWS", (16, 32, 64))
        patch.setattr(stripes, "_FAR_GROUP_ROWS", 64)
        store = history_of(tmp_path_factory.mktemp("arena") / "h", EVENTS, num_buckets=1)
        store.compact(fanout=2)
    return store


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that a few thousand events take all the turns."""
    monkeypatch.setattr(reader, "_PIECE_ROWS", 97)
    monkeypatch.setattr(filling, "_PIECES_AT_ONCE", 2)
    monkeypatch.setattr(filling, "_ROWS_TOGETHER", 45)
    monkeypatch.setattr(reader, "_COLUMNS_AT_ONCE", 2)
    monkeypatch.setattr(gathering, "_LONG", 9)
    monkeypatch.setattr(gathering, "_BLOCK", 3)
    monkeypatch.setattr(buffers_module, "_SMALLEST", 64)


def check(found: Histories, length: int | None, traits: list[str]) -> None:
    expected = histories(EVENTS)
    for row, user in enumerate(found.user_ids.to_pylist()):
        events = expected.get(user, [])
        events = events if length is None else events[len(events) - min(length, len(events)) :]
        mine = found.of(row)
        for trait in traits:
            assert mine[trait].to_pylist() == [event[trait] for event in events]


@few(40)
@given(
    users=st.lists(st.sampled_from([*sorted({e["user_id"] for e in EVENTS}), -5]), max_size=70),
    length=st.one_of(st.none(), st.integers(0, 200)),
    traits=st.lists(st.sampled_from(TRAIT_NAMES), unique=True),
    threads=st.sampled_from([None, 1, 2, 5]),
    reused=st.booleans(),
)
def test_every_way_of_reading_gives_what_the_reference_gives(
    store: HistoryStore,
    users: list[int],
    length: int | None,
    traits: list[str],
    threads: int | None,
    reused: bool,
) -> None:
    buffers = BUFFERS if reused else None
    projection = Projection(traits, length)
    found = store.snapshot().read(users, projection, buffers=buffers, threads=threads)
    assert found.user_ids.to_pylist() == users
    check(found, length, traits)


BUFFERS = ArenaBuffers()


def test_any_stretch_of_positions_is_the_slice_of_all(store: HistoryStore) -> None:
    snapshot = store.snapshot()
    users = snapshot.user_ids()
    index = snapshot.index_of(users)
    end = index.num_events
    whole = index.read(TRAIT_NAMES, np.zeros_like(end), end)
    rng = np.random.default_rng(0)
    for _ in range(20):
        last = rng.integers(0, end + 1)
        first = rng.integers(0, last + 1)
        part = index.read(TRAIT_NAMES, first, last, buffers=BUFFERS, threads=2)
        assert part.end_positions.tolist() == last.tolist()
        for row in range(len(users)):
            low = int(whole.offsets[row] + first[row])
            size = int(last[row] - first[row])
            for name, values in part.of(row).items():
                assert values == whole.columns[name].slice(low, size)


def test_memory_comes_back_only_when_nothing_refers_to_it(store: HistoryStore) -> None:
    buffers = ArenaBuffers()
    snapshot = store.snapshot()
    users = snapshot.user_ids()
    projection = Projection(["item_id"])

    def address(histories: Histories) -> int:
        return int(histories.columns["item_id"].buffers()[1].address)

    found = snapshot.read(users, projection, buffers=buffers)
    first = address(found)
    kept = found.columns["item_id"].slice(3, 40).to_numpy()
    expected = kept.tolist()
    del found
    other = snapshot.read(users[:30], projection, buffers=buffers)
    assert address(other) != first  # a slice of it is still in use
    assert kept.tolist() == expected
    del kept, other
    gc.collect()
    addresses = {address(snapshot.read(users, projection, buffers=buffers)) for _ in range(5)}
    assert len(addresses) == 1


def test_idle_memory_is_bounded() -> None:
    buffers = ArenaBuffers(max_idle_bytes=100_000)
    lent = [buffers.empty(40_000, "u1") for _ in range(5)]
    del lent
    buffers.empty(1_000_000, "u1")
    assert sum(map(len, buffers._idle)) <= 100_000
    small = buffers.empty(10_000, "u1")  # not out of one that is four times as large
    assert small.base is None or len(small.base) < 40_000


def test_many_threads_share_buffers_and_a_store(store: HistoryStore) -> None:
    buffers = ArenaBuffers()
    snapshot = store.snapshot()
    users = sorted(histories(EVENTS))
    started = threading.Barrier(4)

    def work(number: int) -> None:
        started.wait()
        rng = np.random.default_rng(number)
        for _ in range(15):
            some = rng.choice(users, 25, replace=False).tolist()
            found = snapshot.read(some, Projection(list(TRAIT_NAMES)), buffers=buffers, threads=2)
            check(found, None, list(TRAIT_NAMES))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_a_thread_is_the_caller_s(
    tmp_path: Path, store: HistoryStore, threads: int
) -> None:
    broken = history_of(tmp_path / "h", EVENTS, num_buckets=1)
    snapshot = broken.snapshot()
    assert snapshot.read([1]).num_events >= 0
    path = Path(broken.uri, snapshot.files()["path"][1].as_py())
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(Exception, match=path.name):
        snapshot.read(snapshot.user_ids(), threads=threads)


# -- copying --------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), max_size=15),
    st.sampled_from([pa.int8(), pa.int16(), pa.float32(), pa.int64(), pa.timestamp("us")]),
    st.randoms(use_true_random=False),
)
def test_placing_ranges_undoes_gathering_them(
    pairs: list[tuple[int, int]], kind: pa.DataType, rng: np.random.Generator
) -> None:
    values = pa.array(np.arange(60) % 100).cast(pa.int64()).cast(kind).slice(3)
    starts = np.array([start for start, _ in pairs], np.int64)
    counts = np.array([count for _, count in pairs], np.int64)
    order = list(range(len(pairs)))
    rng.shuffle(order)  # where the ranges go: one after another, in another order
    targets = np.zeros(len(pairs), np.int64)
    targets[order] = np.cumsum(counts[order]) - counts[order]
    width = width_of(kind)
    memory = np.empty(int(counts.sum()), f"u{width}")
    Placement(starts, counts, targets).copy(values, memory)
    placed = pa.Array.from_buffers(kind, len(memory), [None, pa.py_buffer(memory)])
    assert placed == gather(values, starts[order], counts[order])


def test_only_plain_values_have_a_width() -> None:
    assert [width_of(k) for k in (pa.int8(), pa.float16(), pa.date32(), pa.uint64())] == [
        1,
        2,
        4,
        8,
    ]
    for kind in (pa.bool_(), pa.string(), pa.dictionary(pa.int8(), pa.int64()), pa.decimal128(5)):
        assert width_of(kind) is None
