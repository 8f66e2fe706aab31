"""Recency bands: the layout is arithmetic, and reading through it changes nothing but the cost."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import FIRST_DAY, few, group_of, many_events, seal_days

from vlm_dagster import FeatureGroup, HistoryStore, Projection, Trait
from vlm_dagster.errors import SchemaError, TableError
from vlm_dagster.sealed import stripes, writer
from vlm_dagster.sealed.stripes import DEFAULT_EDGES, Stripes, choose_edges, rows_decoded
from vlm_dagster.sealed.writer import SegmentWriter

EVENTS = many_events(seed=7, num_events=3_000, num_users=40)
BANDS = [(), (1,), (3, 5, 17), (10_000,)]


def history(tmp_path: Path, bands: tuple[int, ...], name: str = "h") -> HistoryStore:
    group = group_of(EVENTS)
    store = HistoryStore.create(tmp_path / f"{name}{len(bands)}", group, 2, bands=bands)
    return seal_days(store, EVENTS)


edge_lists = st.lists(st.integers(1, 50), unique=True, max_size=5).map(lambda x: tuple(sorted(x)))


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), edge_lists)
def test_the_layout_puts_every_row_in_one_place_near_bands_first(
    counts: list[int], edges: tuple[int, ...]
) -> None:
    layout = Stripes(edges).layout(np.array(counts, np.int64))
    placed: list[tuple[int, int, int]] = []  # row of the file, user, row of the user
    for band in range(len(edges) + 1):
        for user in range(len(counts)):
            low, high = layout.lows[band, user], layout.highs[band, user]
            start = layout.starts[band, user]
            placed += [(int(start + i - low), user, i) for i in range(low, high)]
            newest = [counts[user] - 1 - i for i in range(low, high)]
            reach = [0, *edges, 10**9]
            assert all(reach[band] <= n < reach[band + 1] for n in newest)
    assert sorted(row for row, _, _ in placed) == list(range(sum(counts)))
    assert sorted((u, i) for _, u, i in placed) == [
        (u, i) for u, count in enumerate(counts) for i in range(count)
    ]


@pytest.mark.parametrize("bands", BANDS[1:])
def test_bands_change_nothing_that_is_read(tmp_path: Path, bands: tuple[int, ...]) -> None:
    plain, striped = history(tmp_path, ()), history(tmp_path, bands)
    assert plain.sealed_windows() == striped.sealed_windows()
    users = list(range(41))
    for length in (None, 0, 1, 4, 20, 10**6):
        for traits in (None, ["event_id"], ["available_at", "item_id", "event_time"]):
            one = plain.snapshot().read(users, Projection(traits, length))
            other = striped.snapshot().read(users, Projection(traits, length))
            assert one.columns == other.columns
            assert one.offsets.tolist() == other.offsets.tolist()
    assert striped.snapshot().verify(deep=True).ok


def test_the_newest_events_are_few_row_groups(tmp_path: Path) -> None:
    """One user of 100,000 events: the newest 30 lie in a row group of their own."""
    num = 100_000
    rng = np.random.default_rng(0)
    times = np.sort(rng.integers(0, 86_400_000_000, num)) + GROUP_START
    table = pa.table(
        {
            "user_id": np.full(num, 5),
            "event_id": np.arange(num),
            "event_time": pa.array(times, pa.timestamp("us", "UTC")),
            "item_id": rng.integers(0, 2**60, num),
        }
    )
    group = FeatureGroup("clicks", [Trait("item_id", pa.int64())])
    store = HistoryStore.create(tmp_path / "h", group, 1)
    store.seal("2025-01-01", table)
    snapshot = store.snapshot()
    snapshot.stats.counts_bytes = True
    found = snapshot.read([5], Projection(max_length=30))
    assert found.columns["item_id"].to_pylist() == table["item_id"].to_pylist()[-30:]
    assert snapshot.stats.rows_decoded == 128
    few = snapshot.stats.data_bytes
    snapshot.stats.reset()
    snapshot.read([5])
    assert snapshot.stats.rows_decoded == num
    assert 0 < few < snapshot.stats.data_bytes / 200


GROUP_START = 1_735_689_600_000_000


def test_no_row_group_spans_two_bands_and_the_edges_are_recorded(tmp_path: Path) -> None:
    store = history(tmp_path, (3, 5, 17, 10**9))
    for row in store.snapshot().files().to_pylist():
        reader = store._table.reader([row["path"]])
        longest = int(reader.users.counts.max())  # the edges that nobody reaches past are left out
        assert reader.header["bands"] == [edge for edge in (3, 5, 17, 10**9) if edge < longest]
        layout = reader.users.layout
        band_ends = np.cumsum((layout.highs - layout.lows).sum(axis=1))
        metadata = pq.read_metadata(Path(store.uri, row["path"]))
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        assert set(band_ends.tolist()) <= set(np.cumsum(sizes).tolist())


def test_rows_that_wait_on_disk_come_out_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = history(tmp_path, (3, 17))
    monkeypatch.setattr(writer, "HELD_BYTES", 1_000)
    spilled = history(tmp_path, (3, 17), "spilled")
    files = whole.snapshot().files()["path"].to_pylist()
    assert len(files) == 8
    for mine, theirs in zip(files, spilled.snapshot().files()["path"].to_pylist(), strict=True):
        a, b = pq.ParquetFile(Path(whole.uri, mine)), pq.ParquetFile(Path(spilled.uri, theirs))
        assert a.read() == b.read()
        assert a.num_row_groups == b.num_row_groups
    assert not list(Path(spilled.uri).rglob("*.arrow"))


@pytest.mark.parametrize("bands", [(0,), (5, 5), (7, 3), (1.5,), (True,), tuple(range(1, 40))])
def test_bands_that_make_no_sense_are_refused(tmp_path: Path, bands: tuple) -> None:
    with pytest.raises(SchemaError, match="band edges"):
        HistoryStore.create(tmp_path / "h", group_of(EVENTS), 2, bands=bands)


# -- encodings ------------------------------------------------------------------------------------


def encodings_of(path: Path) -> dict[str, set[str]]:
    group = pq.read_metadata(path).row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    return {c.path_in_schema: set(c.encodings) for c in columns}


def test_encodings_follow_the_kind_unless_the_trait_says_otherwise(tmp_path: Path) -> None:
    traits = [
        Trait("item_id", pa.int64()),
        Trait("action", pa.int8()),
        Trait("dwell", pa.float32()),
        Trait("shop", pa.int64(), encoding="dictionary"),
        Trait("price", pa.float64(), encoding="plain"),
        Trait("code", pa.int64(), encoding="byte_stream_split"),
    ]
    group = FeatureGroup("clicks", traits)
    store = HistoryStore.create(tmp_path / "h", group, 1)
    rows = {t.name: pa.array([1, 2, 2], t.type) for t in traits}
    rows |= {"user_id": [1, 1, 2], "event_id": [1, 2, 3]}
    rows["event_time"] = pa.array([GROUP_START + i for i in range(3)], pa.timestamp("us", "UTC"))
    store.seal("2025-01-01", pa.table(rows))
    found = encodings_of(Path(store.uri, store.snapshot().files()["path"][0].as_py()))
    assert "available_at" not in found  # it would repeat event_time
    for name in ("user_id", "event_time", "item_id"):
        assert "DELTA_BINARY_PACKED" in found[name]
    assert "BYTE_STREAM_SPLIT" in found["dwell"] & found["code"] & found["event_id"]
    assert "RLE_DICTIONARY" in found["action"] & found["shop"]
    assert found["price"] <= {"PLAIN", "RLE"}
    again = HistoryStore.open(store.uri)
    assert again.group == group
    assert again.snapshot().read([1]).columns["code"].to_pylist() == [1, 2]


@pytest.mark.parametrize(
    ("kind", "encoding"),
    [
        (pa.float32(), "delta"),
        (pa.string(), "byte_stream_split"),
        (pa.bool_(), "dictionary"),
        (pa.int64(), "zip"),
    ],
)
def test_an_encoding_that_does_not_fit_is_refused(kind: pa.DataType, encoding: str) -> None:
    with pytest.raises(
        SchemaError, match=rf"encoding {encoding!r} does not fit {kind}.*Use one of"
    ):
        Trait("x", kind, encoding=encoding)


# -- choosing edges -------------------------------------------------------------------------------


@few(20)
@given(
    st.lists(st.sampled_from((2, 5, 40, 300)), min_size=2, max_size=4),
    st.lists(st.integers(1, 60), min_size=1, max_size=3),
    edge_lists,
)
def test_the_rows_that_reading_decodes_are_foretold_by_arithmetic(
    per_day: list[int], lengths: list[int], edges: tuple[int, ...]
) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(stripes, "_GROUP_ROWS", (8, 16))
        patch.setattr(stripes, "_FAR_GROUP_ROWS", 32)
        events = [
            event
            for number, count in enumerate(per_day)
            for event in many_events(seed=number, num_events=count, num_users=9)
        ]
        for number, event in enumerate(events):
            event["event_id"] = number
        store = HistoryStore.create(f"{folder}/h", group_of(events), 1, bands=edges)
        snapshot = seal_days(store, events).snapshot()
        index = snapshot.index_of(snapshot.user_ids())
        assert (index.counts.sum(axis=0) == index.num_events).all()
        for length in lengths:
            snapshot.stats.reset()
            snapshot.read(snapshot.user_ids(), Projection(["item_id"], length))
            assert snapshot.stats.rows_decoded == rows_decoded(index.counts, length, edges)


def test_edges_chosen_from_the_data_decode_no_more_rows_than_the_default_ones() -> None:
    rng = np.random.default_rng(0)
    for mean in (100, 4_000):
        files = rng.poisson(rng.lognormal(0, 1.5, 300) * mean, (3, 300)).astype(np.int64)
        files[0] *= 8
        for lengths in ([50], [256, 2_000], [7, 700, 7_000]):
            edges = choose_edges(files, lengths)
            assert Stripes(edges).edges == edges
            needed = [np.minimum(files.sum(axis=0), length).sum() for length in lengths]
            chosen, default = (
                sum(
                    rows_decoded(files, length, some) / least
                    for length, least in zip(lengths, needed, strict=True)
                )
                for some in (edges, DEFAULT_EDGES)
            )
            assert chosen <= default * 1.01 ** len(DEFAULT_EDGES)


# -- rows that wait on disk -----------------------------------------------------------------------


@pytest.mark.parametrize("bands", [(), (2, 5)])
@pytest.mark.parametrize("limit", [0, 5_000, 10**9])
def test_chunks_that_wait_on_disk_give_the_bytes_of_one_chunk_in_memory(
    tmp_path: Path, bands: tuple[int, ...], limit: int
) -> None:
    schema = pa.schema([pa.field(n, pa.int64(), nullable=False) for n in ("user_id", "t", "id")])
    counts = np.random.default_rng(0).integers(1, 9, 300)
    users = np.repeat(np.arange(len(counts)), counts)
    rows = pa.record_batch({"user_id": users, "t": np.arange(len(users)), "id": users % 7})
    cuts = np.searchsorted(users, [0, 1, 100, 101, 299, 300]).tolist()
    files = []
    for name, edges in (("one", [0, len(users)]), ("many", cuts)):
        writer = SegmentWriter(
            tmp_path / name,
            schema,
            {"segment": "s"},
            ("user_id", "t", "id"),
            stripes=Stripes.of(bands),
            memory_limit=limit,
        )
        for low, high in pairwise(edges):
            writer.write(rows.slice(low, high - low))  # of nullable columns, as they may come
        writer.close()
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_portable_table_has_no_encoding_that_old_readers_lack(tmp_path: Path) -> None:
    group = group_of(EVENTS)
    encodings = {}
    for portable in (False, True):
        uri = tmp_path / str(portable)
        store = HistoryStore.create(uri, group, 2, start=FIRST_DAY, portable=portable)
        seal_days(store, EVENTS)
        store.compact(fanout=2)
        assert HistoryStore.open(uri).snapshot().verify(deep=True).ok
        found = set()
        for path in store.snapshot().files()["path"].to_pylist():
            for group_number in range((meta := pq.read_metadata(uri / path)).num_row_groups):
                row_group = meta.row_group(group_number)
                for i in range(meta.num_columns):
                    found.update(row_group.column(i).encodings)
        encodings[portable] = found
        with pytest.raises(TableError, match=r"created with portable = "):
            HistoryStore.create(uri, group, 2, start=FIRST_DAY, portable=not portable)
    assert "BYTE_STREAM_SPLIT" in encodings[False]
    assert encodings[True] <= {"PLAIN", "RLE", "RLE_DICTIONARY", "DELTA_BINARY_PACKED"}
