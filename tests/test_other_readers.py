"""Histories and pointers are ordinary Delta tables: other engines read the very same rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, QueryBuilder
from strategies import (
    FIRST_US,
    TRAIT_NAMES,
    at,
    day,
    events_of_day,
    group_of,
    history_of,
    many_events,
    request_table,
)

from vlm_dagster import HistoryStore, PointerDataset

EVENTS = many_events(seed=0, num_events=5_000, num_users=60)
COLUMNS = ["user_id", "event_id", "event_time", "available_at", *TRAIT_NAMES]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> HistoryStore:
    return history_of(tmp_path_factory.mktemp("history"), EVENTS, num_buckets=4)


def rows(table: pa.Table) -> list[tuple]:
    """Sorted rows, times as integers, whatever an engine calls its types."""
    columns = []
    for name in COLUMNS:
        column = table.column(name)
        if pa.types.is_timestamp(column.type):
            column = column.cast(pa.timestamp("us", "UTC")).cast(pa.int64())
        columns.append(column.to_pylist())
    return sorted(zip(*columns, strict=True))


def expected(events: list[dict]) -> list[tuple]:
    return sorted(tuple(event[name] for name in COLUMNS) for event in events)


def with_polars(uri: str, where: str | None = None) -> pa.Table:
    frame = pl.scan_delta(uri)
    if where:
        frame = frame.filter(pl.sql_expr(where))
    return frame.collect().to_arrow()


def with_duckdb(uri: str, where: str | None = None) -> pa.Table:
    # Its delta extension is a download; the files that the log lists are all there is to it.
    with duckdb.connect() as connection:
        query = "SELECT * FROM read_parquet(?, hive_partitioning = true)" + (
            f" WHERE {where}" if where else ""
        )
        return connection.sql(query, params=[DeltaTable(uri).file_uris()]).to_arrow_table()


def with_datafusion(uri: str, where: str | None = None) -> pa.Table:
    query = "SELECT * FROM t" + (f" WHERE {where}" if where else "")
    return pa.table(QueryBuilder().register("t", DeltaTable(uri)).execute(query).read_all())


def with_pyarrow(uri: str, where: pc.Expression | None = None) -> pa.Table:
    return DeltaTable(uri).to_pyarrow_dataset().to_table(filter=where)


@pytest.mark.parametrize("read", [with_polars, with_duckdb, with_datafusion, with_pyarrow])
def test_all_rows_are_the_same(store: HistoryStore, read) -> None:
    assert rows(read(store.uri)) == expected(EVENTS)


@pytest.mark.parametrize("read", [with_polars, with_duckdb, with_datafusion])
@pytest.mark.parametrize("user", [0, 17, 59, 60])
def test_a_filter_on_users_drops_none_of_theirs(store: HistoryStore, read, user: int) -> None:
    mine = [event for event in EVENTS if event["user_id"] == user]
    assert rows(read(store.uri, f"user_id = {user}")) == expected(mine)


def time_filters() -> list[tuple[int, int]]:
    """Spans that begin or end at, just before and just after an event, and odd microseconds."""
    moments = sorted({e["available_at"] for e in EVENTS})
    some = [moments[0], moments[len(moments) // 2], moments[-1]]
    return [(t + a, t + b) for t in some for a, b in ((0, 1), (0, 0), (-1, 0), (1, 999), (-999, 1))]


@pytest.mark.parametrize("engine", ["polars", "pyarrow"])
def test_a_filter_on_time_drops_none_within(store: HistoryStore, engine: str) -> None:
    for low, high in time_filters():
        within = expected([e for e in EVENTS if low <= e["available_at"] < high])
        bounds = pa.array([low, high]).cast(pa.timestamp("us", "UTC"))
        if engine == "polars":
            times = pl.Series(bounds)
            frame = pl.scan_delta(store.uri).filter(
                (pl.col("available_at") >= times[0]) & (pl.col("available_at") < times[1])
            )
            assert rows(frame.collect().to_arrow()) == within
        else:
            field = pc.field("available_at")
            assert (
                rows(with_pyarrow(store.uri, (field >= bounds[0]) & (field < bounds[1]))) == within
            )


def test_datafusion_filters_on_time_drop_none_within(store: HistoryStore) -> None:
    for low, high in time_filters():
        within = expected([e for e in EVENTS if low <= e["available_at"] < high])
        where = " AND ".join(
            f"available_at {sign} to_timestamp_micros({bound})"
            for sign, bound in ((">=", low), ("<", high))
        )
        assert rows(with_datafusion(store.uri, where)) == within


@pytest.mark.parametrize("offset", [0, 1, 499, 500, 999, 1_000, 1_001])
def test_times_are_found_at_every_microsecond(tmp_path: Path, offset: int) -> None:
    """Delta would round the statistics of times to milliseconds, if there were any."""
    event = {**EVENTS[0], "available_at": at(0, offset), "event_time": FIRST_US}
    store = history_of(tmp_path, [event], days=[0])
    bound = pa.scalar(at(0, offset), pa.timestamp("us", "UTC"))
    field = pc.field("available_at")
    assert with_pyarrow(store.uri, field == bound).num_rows == 1
    assert with_pyarrow(store.uri, field >= bound).num_rows == 1
    assert with_pyarrow(store.uri, field <= bound).num_rows == 1
    where = f"available_at >= to_timestamp_micros({at(0, offset)})"
    assert with_datafusion(store.uri, where).num_rows == 1
    assert with_datafusion(store.uri, where.replace(">=", "<=")).num_rows == 1
    frame = pl.scan_delta(store.uri).filter(pl.col("available_at") == bound.as_py())
    assert frame.collect().height == 1


@pytest.mark.parametrize(
    "users",
    [
        [-(2**63), 2**63 - 1, 0, -1],
        ["", "\x00", "ä", "a", "\U0001d518", "x" * 63, "x" * 64, "x" * 65, "ü" * 70, "\uffff"],
    ],
    ids=["integers", "strings"],
)
def test_odd_users_are_found_by_every_filter(tmp_path: Path, users: list) -> None:
    events = [{**EVENTS[0], "user_id": user, "event_id": n} for n, user in enumerate(users)]
    events = [{**event, "available_at": at(0, n)} for n, event in enumerate(events)]
    kind = pa.string() if isinstance(users[0], str) else pa.int64()
    store = history_of(tmp_path, events, days=[0], group=group_of(user_id=kind))
    for n, user in enumerate(users):
        found = with_pyarrow(store.uri, pc.field("user_id") == pa.scalar(user, kind))
        assert found["event_id"].to_pylist() == [n]
        frame = pl.scan_delta(store.uri).filter(pl.col("user_id") == pl.lit(user))
        assert frame.collect()["event_id"].to_list() == [n]
        if user != -(2**63) and user != "\x00":
            literal = f"'{user}'" if isinstance(user, str) else str(user)
            assert with_datafusion(store.uri, f"user_id = {literal}").num_rows == 1


def test_partitions_are_columns_of_the_table(store: HistoryStore) -> None:
    found = with_polars(store.uri, f"segment = '{day(1)}'")
    assert rows(found) == expected(events_of_day(EVENTS, 1))
    assert set(found["segment"].to_pylist()) == {day(1)}
    assert set(found["bucket"].to_pylist()) <= set(range(4))


def test_an_older_version_reads_alike(store: HistoryStore) -> None:
    found = pl.scan_delta(store.uri, version=2).collect().to_arrow()
    assert rows(found) == expected([*events_of_day(EVENTS, 0), *events_of_day(EVENTS, 1)])


def test_pointers_read_alike(store: HistoryStore, tmp_path: Path) -> None:
    dataset = PointerDataset.create(tmp_path / "pointers", ["ratings"], num_buckets=3)
    asked = events_of_day(EVENTS, 2)
    table = request_table(asked, pa.int64(), ["user_id", "event_id"], pa.int64())
    dataset.seal(day(2), table, {"ratings": store.snapshot()})
    ours = pl.from_arrow(dataset.snapshot().to_table()).sort("request_id")
    theirs = pl.scan_delta(dataset.uri).select(ours.columns).collect().sort("request_id")
    assert ours.equals(theirs)


def test_statistics_in_the_log_count_rows_and_name_no_value(store: HistoryStore) -> None:
    for action in _adds(store.uri):
        stats = json.loads(action["stats"])
        path = Path(store.uri, unquote(action["path"]))
        assert stats.keys() == {"numRecords", "nullCount"}
        assert stats["numRecords"] == pq.read_metadata(path).num_rows


@pytest.mark.parametrize("column", COLUMNS)
def test_every_column_can_be_filtered_by(store: HistoryStore, column: str) -> None:
    """Half a set of statistics would have some readers find nothing."""
    value = EVENTS[0][column]
    wanted = [e for e in EVENTS if e[column] == value]
    kind = store.group.event_schema.field(column).type
    found = with_pyarrow(store.uri, pc.field(column) == pa.scalar(value, kind))
    assert rows(found) == expected(wanted)


def _adds(uri: str) -> Iterator[dict]:
    for commit in sorted(Path(uri, "_delta_log").glob("*.json")):
        for line in commit.read_text().splitlines():
            if line.startswith('{"add"'):
                yield json.loads(line)["add"]
