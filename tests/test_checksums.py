"""Checksums of ranges: hashed block by block, from pieces in any order, in memory for ranges only."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import checksum
from strategies import TIME, at, day, history_of, integer_ids, many_events, string_ids

from vlm_dagster import HistoryStore, PointerDataset, Projection, hashing
from vlm_dagster.errors import ChecksumError
from vlm_dagster.hashing import event_sums, event_words, mix64
from vlm_dagster.history import ArenaBuffers, filling
from vlm_dagster.loaders.materialize import UnitData, materialize
from vlm_dagster.pointers.checksum import RangeSums
from vlm_dagster.sealed import reader

EVENTS = many_events(seed=3, num_events=1_500, num_users=12)
USERS = pa.array(range(12))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that some events take several blocks, pieces and tasks."""
    monkeypatch.setattr(hashing, "_BLOCK_WORDS", 7)
    monkeypatch.setattr(reader, "_PIECE_ROWS", 41)
    monkeypatch.setattr(filling, "_PIECES_AT_ONCE", 2)
    monkeypatch.setattr(filling, "_ROWS_TOGETHER", 30)


# -- sums of runs ---------------------------------------------------------------------------------

event_ids = st.one_of(
    st.lists(integer_ids, min_size=1, max_size=40),
    st.lists(string_ids, min_size=1, max_size=40),
)


@given(event_ids, st.data())
def test_runs_sum_up_to_the_documented_checksums(ids: list, data: st.DataObject) -> None:
    cuts = data.draw(st.sets(st.integers(1, max(len(ids) - 1, 1)), max_size=len(ids)))
    starts = [0, *sorted(cut for cut in cuts if cut < len(ids))]
    positions = [data.draw(st.integers(0, 2**40)) for _ in starts]
    offset = data.draw(st.integers(0, 3))
    values = pa.array([*ids[:1] * offset, *ids]).slice(offset)
    found = event_sums(values, np.array(starts), np.array(positions))
    assert found.view(np.int64).tolist() == [
        checksum(ids[begin:end], position)
        for begin, end, position in zip(starts, [*starts[1:], len(ids)], positions, strict=True)
    ]


@pytest.mark.parametrize("num", [1, 6, 7, 8, 13, 14, 15, 50])
@pytest.mark.parametrize("kind", [pa.int64(), pa.int32(), pa.string(), pa.large_string()])
def test_runs_end_before_on_and_after_blocks_edges(num: int, kind: pa.DataType) -> None:
    ids = pa.array(np.arange(num) * 7 - 3).cast(kind)
    words = event_words(ids, np.arange(num) + 100)
    for cut in range(num):
        starts = np.unique([0, cut])
        found = event_sums(ids, starts, starts + 100)
        assert found.tolist() == np.add.reduceat(words, starts).tolist()


def test_no_events_have_no_sums() -> None:
    none = np.zeros(0, np.int64)
    assert event_sums(pa.array([], pa.int64()), none, none).tolist() == []
    assert mix64(np.zeros(0, np.uint64)).tolist() == []


# -- ranges ---------------------------------------------------------------------------------------


@given(st.booleans(), st.randoms(use_true_random=False))
def test_ranges_sum_up_whatever_pieces_they_come_in(strings: bool, rng: random.Random) -> None:
    """Some users, some ranges of each; the events come in pieces, in any order, others between."""
    first = [rng.randrange(50) for _ in range(rng.randrange(1, 5))]
    last = [low + rng.choice([0, 1, rng.randrange(30)]) for low in first]
    ids = [
        [rng.randrange(1000) for _ in range(low, high)]
        for low, high in zip(first, last, strict=True)
    ]
    if strings:
        ids = [[f"event {event_id}" for event_id in mine] for mine in ids]
    ranges = []
    for user in (rng.randrange(len(first)) for _ in range(rng.randrange(12))):
        begin, end = sorted(rng.randint(first[user], last[user]) for _ in range(2))
        ranges.append((user, begin, end) if begin < end else (user, *[rng.randrange(99)] * 2))
    rank, starts, ends = (np.array([r[i] for r in ranges], np.int64) for i in range(3))
    sums = RangeSums(np.array(first), np.array(last), rank, starts, ends)

    flat = [event_id for mine in ids for event_id in mine]
    edges = np.cumsum([0, *map(len, ids)]).tolist()
    cuts = sorted({*edges, *(rng.randint(0, len(flat)) for _ in range(6))})
    runs = list(pairwise(cuts))
    rng.shuffle(runs)
    kind = pa.string() if strings else pa.int64()
    while runs:
        some, runs = runs[:3], runs[3:]
        piece: list = []
        rows, counts, places = [], [], []
        for low, high in some:
            piece += flat[:1] * rng.randrange(3)  # rows that nobody asked for
            rows.append(len(piece))
            counts.append(high - low)
            places.append(low)
            piece += flat[low:high]
        sums.add(pa.array(piece, kind), np.array(rows), np.array(counts), np.array(places))
    assert sums.checksums().tolist() == [
        checksum(ids[user][begin - first[user] : end - first[user]], begin) if begin < end else 0
        for user, begin, end in ranges
    ]


# -- verifying a unit -----------------------------------------------------------------------------


def unit_of(store: HistoryStore, uri: Path, max_length: int | None) -> tuple[PointerDataset, dict]:
    dataset = PointerDataset.create(uri, ["ratings"], request="request_time", num_buckets=1)
    moments = [(user, at(3, second * 1_000_000)) for user in range(12) for second in (0, 40, 199)]
    requests = pa.table(
        {
            "user_id": [user for user, _ in moments],
            "request_id": list(range(len(moments))),
            "request_time": pa.array([moment for _, moment in moments], TIME),
        }
    )
    dataset.seal(day(3), requests, {"ratings": store.snapshot()})
    return dataset, {"ratings": Projection(["item_id"], max_length)}


def read(dataset: PointerDataset, store: HistoryStore, projections: dict, **options) -> UnitData:
    pointers, histories = dataset.snapshot(), {"ratings": store.snapshot()}
    columns = ["request_time"]
    return materialize(
        pointers, histories, projections, 0, USERS, columns=columns, verify=True, **options
    )


@pytest.mark.parametrize("max_length", [None, 10_000, 5, 0])
def test_one_wrong_event_is_found_wherever_it_lies(tmp_path: Path, max_length: int | None) -> None:
    store = history_of(tmp_path / "h", EVENTS)
    dataset, projections = unit_of(store, tmp_path / "p", max_length)
    unit = read(dataset, store, projections)
    lengths = unit.arenas["ratings"].lengths
    assert lengths.max() == (0 if max_length == 0 else min(max_length or 999, lengths.max()))
    of_user = sorted(
        (e for e in EVENTS if e["user_id"] == 5),
        key=lambda event: (event["available_at"], event["event_id"]),
    )
    spanned = [event for event in of_user if event["available_at"] < at(3, 199_000_000)]
    for number, wrong in enumerate([spanned[0], spanned[len(spanned) // 2], spanned[-1]]):
        changed = [{**e, "event_id": 9_999_999} if e is wrong else e for e in EVENTS]
        other = history_of(tmp_path / f"h{number}", changed)
        found = read(dataset, other, projections)
        assert isinstance(found.bad, ChecksumError)
        assert found.bad.user_id == 5
        assert found.kept is not None
        assert 0 < (~found.kept).sum() < found.num_examples


def test_what_is_only_verified_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole histories are verified, five events of each are held."""
    store = history_of(tmp_path / "h", EVENTS)
    dataset, projections = unit_of(store, tmp_path / "p", 5)
    held: list[int] = []
    original = ArenaBuffers.empty

    def counted(self: ArenaBuffers, num_values: int, kind: str):
        held.append(num_values)
        return original(self, num_values, kind)

    monkeypatch.setattr(ArenaBuffers, "empty", counted)
    unit = read(dataset, store, projections, buffers=ArenaBuffers())
    num_events = len(unit.arenas["ratings"].columns["item_id"])
    assert set(held) <= {unit.num_examples, num_events}
    whole = read(dataset, store, {"ratings": Projection(["item_id"])})
    assert 0 < 2 * num_events < len(whole.arenas["ratings"].columns["item_id"])


def test_columns_are_visited_event_by_event(tmp_path: Path) -> None:
    store = history_of(tmp_path / "h", EVENTS)
    index = store.snapshot().index_of(USERS.filter(pa.array([True, False] * 6)))
    end = index.num_events
    first = end // 3
    whole = index.read(["event_id", "title"], first, end)
    for kept in ([], ["title"], ["event_id", "item_id"]):
        seen = {"event_id": [None] * whole.num_events, "title": [None] * whole.num_events}

        def visit(name, values, rows, counts, places, seen=seen) -> None:
            for row, count, place in zip(rows, counts, places, strict=True):
                seen[name][place : place + count] = values.slice(row, count).to_pylist()

        visits = {name: lambda *piece, name=name: visit(name, *piece) for name in seen}
        found = index.read(kept, first, end, visits=visits, threads=1)
        assert list(found.columns) == kept
        assert all(values == whole.columns[name].to_pylist() for name, values in seen.items())
