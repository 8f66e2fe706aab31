"""Reading over a network: few requests, many at a time, decoding meanwhile."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_dagster import FeatureGroup, HistoryStore, Projection, Trait
from vlm_dagster.errors import CorruptFileError
from vlm_dagster.history import Histories
from vlm_dagster.history.snapshot import Snapshot
from vlm_dagster.sealed import reader
from vlm_dagster.storage import ObjectStorage, coalesce
from vlm_dagster.windows import WindowGrid

NUM_DAYS, NUM_USERS, PER_DAY = 8, 50, 20_000
LATENCY_S = 0.2
GROUP = FeatureGroup(
    "clicks",
    [
        Trait("item_id", pa.int64()),
        Trait("action", pa.int8()),
        Trait("dwell", pa.float32()),
        Trait("title", pa.string()),
        Trait("liked", pa.bool_()),
    ],
)


class Slow:
    """An object store that answers late, and counts what it is asked for."""

    def __init__(self, store: Any, latency_s: float) -> None:
        self._store = store
        self.latency_s = latency_s
        self.asked: Counter[str] = Counter()
        self.num_bytes = 0
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        def late(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                self.asked[name] += 1
                if name == "get_range":
                    length = options.get("length")
                    self.num_bytes += (
                        options["end"] - options["start"] if length is None else length
                    )
            time.sleep(self.latency_s)
            return getattr(self._store, name)(*arguments, **options)

        return late


def day(number: int) -> str:
    return WindowGrid("daily").at(20_000 + number).key


def events(number: int) -> pa.Table:
    rng = np.random.default_rng(number)
    window = WindowGrid("daily").at(20_000 + number)
    times = np.sort(rng.integers(window.start_us, window.end_us, PER_DAY))
    return pa.table(
        {
            "user_id": rng.integers(0, NUM_USERS, PER_DAY),
            "event_id": np.arange(PER_DAY) + number * PER_DAY,
            "event_time": pa.array(times, pa.timestamp("us", "UTC")),
            "item_id": rng.integers(0, 2**60, PER_DAY),
            "action": rng.integers(0, 4, PER_DAY).astype(np.int8),
            "dwell": rng.random(PER_DAY).astype(np.float32),
            "title": [f"title {i}" for i in rng.integers(0, 1_000, PER_DAY)],
            "liked": rng.integers(0, 2, PER_DAY).astype(bool),
        }
    )


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> HistoryStore:
    uri = tmp_path_factory.mktemp("fetching") / "h"
    store = HistoryStore.create(uri, GROUP, 1, bands=(16, 64))
    for number in range(NUM_DAYS):
        store.seal(day(number), events(number))
    return store


@pytest.fixture
def remote(local: HistoryStore) -> Iterator[tuple[Snapshot, Slow]]:
    """The same table behind a slow object store."""
    store = HistoryStore.open(local.uri)
    storage = ObjectStorage(f"file://{local.uri}", {})
    storage._store = slow = Slow(storage._store, LATENCY_S)
    snapshot = store.snapshot()
    assert len(snapshot.segments) == NUM_DAYS
    store._table.storage = storage
    yield snapshot, slow
    storage._pool.shutdown()


def assert_same(one: Histories, other: Histories) -> None:
    assert one.offsets.tolist() == other.offsets.tolist()
    assert one.columns == other.columns


@pytest.mark.parametrize("length", [None, 5])
def test_a_file_costs_a_request_for_its_footer_and_one_for_its_rows(
    local: HistoryStore, remote: tuple[Snapshot, Slow], length: int | None
) -> None:
    snapshot, slow = remote
    projection = Projection(max_length=length)
    start = time.perf_counter()
    found = snapshot.read(range(NUM_USERS), projection)
    seconds = time.perf_counter() - start
    assert_same(found, local.snapshot().read(range(NUM_USERS), projection))
    num_files = NUM_DAYS if length is None else 1
    assert slow.asked == {"get": NUM_DAYS, "get_range": num_files}
    # Footers at the same time, rows at the same time; one after another they would take 16 latencies.
    assert seconds < 8 * LATENCY_S
    slow.asked.clear()
    snapshot.read(range(NUM_USERS), projection)
    assert slow.asked == {"get_range": num_files}  # footers are remembered


def test_columns_far_apart_are_separate_requests(
    local: HistoryStore, remote: tuple[Snapshot, Slow], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_dagster import storage

    monkeypatch.setattr(storage, "_GAP_BYTES", 0)
    snapshot, slow = remote
    slow.latency_s = 0.0
    snapshot.stats.counts_bytes = True
    projection = Projection(["item_id"])
    found = snapshot.read(range(NUM_USERS), projection)
    assert_same(found, local.snapshot().read(range(NUM_USERS), projection))
    assert slow.asked["get_range"] > NUM_DAYS
    assert slow.num_bytes == snapshot.stats.data_bytes  # and nothing beside is fetched


def test_a_footer_longer_than_expected_takes_a_second_request(
    local: HistoryStore, remote: tuple[Snapshot, Slow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_TAIL_BYTES", 100)
    snapshot, slow = remote
    slow.latency_s = 0.0
    assert_same(snapshot.read([1, 7]), local.snapshot().read([1, 7]))
    assert slow.asked["get"] == 2 * NUM_DAYS


def test_a_store_without_suffix_requests_is_asked_for_the_size(
    local: HistoryStore, remote: tuple[Snapshot, Slow], monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, slow = remote
    slow.latency_s = 0.0

    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("suffix")

    monkeypatch.setattr(slow, "get", refuse, raising=False)
    assert_same(snapshot.read([1, 7]), local.snapshot().read([1, 7]))
    assert slow.asked["head"] == NUM_DAYS


def test_a_file_lost_after_its_footer_was_read_is_named(
    local: HistoryStore, remote: tuple[Snapshot, Slow]
) -> None:
    snapshot, slow = remote
    slow.latency_s = 0.0
    snapshot.read([1])
    path = snapshot.files()["path"][2].as_py()
    file = Path(local.uri, path)
    kept = file.read_bytes()
    try:
        file.unlink()
        with pytest.raises(CorruptFileError, match="is missing") as raised:
            snapshot.read([1])
        assert raised.value.path == path
        file.write_bytes(kept[: len(kept) // 3])
        with pytest.raises(CorruptFileError):
            snapshot.read([1])
    finally:
        file.write_bytes(kept)


@given(
    st.lists(st.tuples(st.integers(0, 1_000), st.integers(1, 60)), max_size=20),
    st.integers(0, 100),
    st.integers(1, 500),
)
def test_requests_cover_all_ranges(pairs: list[tuple[int, int]], gap: int, limit: int) -> None:
    ranges = [(start, start + size) for start, size in pairs]
    found = coalesce(ranges, gap=gap, limit=limit)
    assert found == sorted(found)
    assert all(any(a <= start and end <= b for a, b in found) for start, end in ranges)
    for (a, b), (c, d) in pairwise(found):
        assert c - b > gap or max(b, d) - a > limit
    for a, b in found:
        assert b - a <= max(limit, 60)
        inside = sorted(r for r in ranges if a <= r[0] and r[1] <= b)
        assert inside[0][0] == a
        assert max(end for _, end in inside) == b
