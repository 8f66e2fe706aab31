"""The local engine: the same rows in the same order, whatever the memory, threads and buckets."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import DAY_US, TIME, at, day, few, files_below, integer_ids, string_ids

from vlm_dagster import FeatureGroup, HistoryStore, Trait
from vlm_dagster.engines.external import whole_users
from vlm_dagster.engines.local import LocalEngine
from vlm_dagster.engines.order import sorted_order
from vlm_dagster.engines.partition import Partitions
from vlm_dagster.errors import InvalidEventsError, StorageError

times = st.integers(0, 3).map(lambda n: n * 1_000_000_007)
columns = st.one_of(
    st.just((pa.int64(), integer_ids)),
    st.just((pa.string(), string_ids)),
    st.just((TIME, times)),
    st.just((pa.int64(), st.integers(-(2**63), 2**63 - 1))),
)


def naive(value: object) -> object:
    return value.encode() if isinstance(value, str) else value


@st.composite
def keys(draw: st.DrawFn) -> list[pa.Array]:
    num_rows = draw(st.integers(1, 40))
    found = []
    for kind, values in draw(st.lists(columns, min_size=1, max_size=4)):
        drawn = draw(st.lists(values, min_size=num_rows, max_size=num_rows))
        found.append(pa.array(sorted(drawn, key=naive) if draw(st.booleans()) else drawn, kind))
    return found


@given(keys())
def test_rows_are_ordered_as_python_orders_them(columns: list[pa.Array]) -> None:
    plain = [
        (c.cast(pa.int64()) if pa.types.is_timestamp(c.type) else c).to_pylist() for c in columns
    ]
    rows = [tuple(naive(value) for value in row) for row in zip(*plain, strict=True)]
    assert sorted_order(columns).tolist() == sorted(range(len(rows)), key=rows.__getitem__)


@pytest.mark.parametrize("num_users", [1, 3, 50_000])
@pytest.mark.parametrize("distinct_times", [1, 1_000, DAY_US])
@pytest.mark.parametrize("wide", [False, True])
def test_many_rows_are_ordered_as_numpy_orders_them(
    num_users: int, distinct_times: int, wide: bool
) -> None:
    rng = np.random.default_rng(0)
    num = 200_000
    ids = rng.integers(-(2**63), 2**63 - 1, num_users) if wide else np.arange(num_users)
    user = ids[rng.integers(0, num_users, num)]
    time = rng.integers(0, distinct_times, num)
    event = rng.integers(-(2**63), 2**63 - 1, num) if wide else rng.permutation(num)
    arrays = [pa.array(values) for values in (user, time, event, np.arange(num))]
    assert (sorted_order(arrays) == np.lexsort((event, time, user))).all()


# -- buckets --------------------------------------------------------------------------------------

SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("time", TIME, nullable=False),
        pa.field("liked", pa.bool_()),
        pa.field("row", pa.int64()),
    ]
)
BY = ["user_id", "time", "row"]
SMALL = {"in_memory_rows": 0, "memory_limit": "40KB"}


def rows_of(num: int, num_users: int, num_buckets: int, seed: int = 0) -> pa.Table:
    """Rows of users of odd names, each in one bucket."""
    rng = np.random.default_rng(seed)
    user = rng.integers(0, num_users, num)
    return pa.table(
        {
            "user_id": [f"user-{'x' * (u % 7)}{u}" for u in user.tolist()],
            "time": pa.array(rng.integers(0, 50, num)).cast(TIME),
            "liked": user % 3 == 0,
            "bucket": pa.array(user * 7_919 % num_buckets, pa.int32()),
            "row": np.arange(num),
        }
    )


def mapped(
    table: pa.Table, num_buckets: int, scratch: Path, batch_rows: int = 97, **options: object
) -> list[tuple[int, list[pa.RecordBatch]]]:
    return LocalEngine(**options).map_buckets(  # type: ignore[arg-type]
        iter(table.to_batches(max_chunksize=batch_rows)),
        SCHEMA,
        BY,
        num_buckets,
        scratch,
        lambda bucket, rows: (bucket, list(rows)),
    )


@few(30)
@given(
    st.integers(0, 3_000),
    st.sampled_from([1, 2, 40, 1_000]),
    st.sampled_from([1, 3, 65, 200, 65_536]),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([{}, {"in_memory_rows": 0}, SMALL]),
)
def test_every_bucket_is_worked_on_once_with_its_rows_in_order(
    num: int, num_users: int, num_buckets: int, threads: int, options: dict
) -> None:
    table = rows_of(num, num_users, num_buckets)
    with TemporaryDirectory() as folder:
        found = mapped(table, num_buckets, Path(folder), threads=threads, **options)
        assert not list(Path(folder).iterdir())
    ordered = sorted(
        table.to_pylist(), key=lambda r: (r["bucket"], r["user_id"].encode(), r["time"], r["row"])
    )
    expected = [(b, list(rows)) for b, rows in groupby(ordered, key=lambda r: r.pop("bucket"))]
    assert [bucket for bucket, _ in found] == [bucket for bucket, _ in expected]
    for (_, chunks), (_, rows) in zip(found, expected, strict=True):
        assert all(chunk.schema == SCHEMA and chunk.num_rows for chunk in chunks)
        assert [row for chunk in chunks for row in chunk.to_pylist()] == rows
        owners = [set(chunk.column("user_id").to_pylist()) for chunk in chunks]
        assert sum(map(len, owners)) == len(set().union(*owners))


def test_what_is_too_large_for_memory_is_split_by_users_and_then_sorted_by_duckdb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vlm_dagster.engines.local as local

    sorted_outside: list[int] = []
    original = local.sorted_by_duckdb

    def counting(*args: object, **kwargs: object) -> Iterator[pa.RecordBatch]:
        sorted_outside.append(1)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(local, "sorted_by_duckdb", counting)
    for num_users, outside in ((500, 0), (1, 1)):
        table = rows_of(200_000, num_users, 1)
        engine = {"in_memory_rows": 0, "memory_limit": "10MB", "threads": 1}
        ((_, chunks),) = mapped(table, 1, tmp_path, batch_rows=8_192, **engine)
        ((_, (whole,)),) = mapped(table, 1, tmp_path, in_memory_rows=10**9)
        assert pa.Table.from_batches(chunks).equals(pa.Table.from_batches([whole]))
        assert len(sorted_outside) == outside
        assert (len(chunks) > 1) == (num_users > 1)


def test_of_buckets_that_fail_the_first_says_why(tmp_path: Path) -> None:
    def work(bucket: int, rows: Iterator[pa.RecordBatch]) -> None:
        if bucket >= 3:
            raise ZeroDivisionError(bucket)
        list(rows)

    table = rows_of(20_000, 1_000, 16)
    for _ in range(5):
        with pytest.raises(ZeroDivisionError, match=r"^3$"):
            LocalEngine(threads=4, in_memory_rows=0).map_buckets(
                iter(table.to_batches(max_chunksize=999)), SCHEMA, BY, 16, tmp_path, work
            )


def test_a_source_that_fails_at_its_end_leaves_no_bucket_worked_on(tmp_path: Path) -> None:
    worked: list[int] = []

    def source() -> Iterator[pa.RecordBatch]:
        yield from rows_of(20_000, 100, 8).to_batches(max_chunksize=500)
        raise LookupError("the source broke")

    with pytest.raises(LookupError, match="the source broke"):
        LocalEngine(in_memory_rows=0, memory_limit="100KB").map_buckets(
            source(), SCHEMA, BY, 8, tmp_path, lambda bucket, rows: worked.append(bucket)
        )
    assert worked == []


def test_rows_beyond_the_limit_go_to_disk_and_come_back_in_the_order_they_came(
    tmp_path: Path,
) -> None:
    table = rows_of(10_000, 100, 4)
    parts = Partitions(tmp_path, 4, limit=100_000)
    for batch in table.to_batches(max_chunksize=500):
        parts.add(batch)
    found = parts.finish()
    assert len(list(tmp_path.iterdir())) == 4
    for part in found:
        rows = pa.Table.from_batches(part.take())["row"].to_pylist()
        assert rows == sorted(rows)
        assert len(rows) == part.num_rows
    assert not list(tmp_path.iterdir())


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=12), st.integers(1, 5))
def test_users_are_made_whole(runs: list[tuple[int, int]], chunk: int) -> None:
    users = sorted(user for user, length in runs for _ in range(length))
    table = pa.table({"user_id": pa.array(users, pa.int64())})
    chunks = list(whole_users(iter(table.to_batches(max_chunksize=chunk)), "user_id"))
    assert [user for c in chunks for user in c.column("user_id").to_pylist()] == users
    owners = [set(c.column("user_id").to_pylist()) for c in chunks]
    assert sum(map(len, owners)) == len(set(users))


@pytest.mark.parametrize("amount", ["", "1 PB", "80%", "-1GB", "many"])
def test_an_amount_of_memory_that_cannot_be_is_refused(amount: str) -> None:
    with pytest.raises(ValueError, match="not an amount of memory"):
        LocalEngine(memory_limit=amount)


# -- files ----------------------------------------------------------------------------------------

GROUP = FeatureGroup(
    "ratings",
    [Trait("item_id", pa.int64()), Trait("title", pa.string()), Trait("liked", pa.bool_())],
)


def events(num: int, num_users: int) -> pa.Table:
    """Events of one day in any order, of users with few and with many."""
    rng = np.random.default_rng(1)
    item = rng.integers(0, 1_000, num)
    return pa.table(
        {
            "user_id": (num_users * rng.random(num) ** 3).astype(np.int64),
            "event_id": rng.permutation(num),
            "event_time": pa.array(at(0) + rng.integers(0, DAY_US, num)).cast(TIME),
            "item_id": item,
            "title": pa.array(np.char.add("title ", (item % 60).astype(str))),
            "liked": item % 2 == 0,
        }
    )


def test_the_bytes_are_the_same_for_any_threads_and_memory(tmp_path: Path) -> None:
    table = events(300_000, 2_000)
    uri = HistoryStore.create(tmp_path, GROUP, 3, bands=(16, 64)).uri
    paths = []
    for options in (
        {"threads": 1},
        {"threads": 2},
        {"threads": 7},
        {"in_memory_rows": 10**9},
        {"threads": 2, "memory_limit": "64MB"},  # spills
        {"threads": 1, "memory_limit": "16MB"},  # and splits
    ):
        staged = HistoryStore.open(uri, engine=LocalEngine(**options)).stage(day(0), table)  # type: ignore[arg-type]
        paths.append([file.path for file in staged.files])
    assert len(paths[0]) == 3
    assert all(found == paths[0] for found in paths)


def test_one_user_with_more_than_fits_into_memory_gives_the_same_bytes(tmp_path: Path) -> None:
    table = events(300_000, 1)
    uri = HistoryStore.create(tmp_path, GROUP, 2).uri
    small = LocalEngine(threads=1, memory_limit="24MB")
    (one,) = HistoryStore.open(uri, engine=small).stage(day(0), table).files
    (two,) = HistoryStore.open(uri).stage(day(0), table).files
    assert one == two


def test_an_invalid_row_at_the_very_end_leaves_nothing_behind(tmp_path: Path) -> None:
    table = events(200_000, 500)
    late = table.slice(0, 1).set_column(2, "event_time", pa.array([at(1)], TIME))
    store = HistoryStore.create(tmp_path, GROUP, 4, engine=LocalEngine(memory_limit="2MB"))
    before = files_below(store.uri)
    with pytest.raises(InvalidEventsError, match=f"row {table.num_rows}"):
        store.seal(day(0), pa.concat_tables([table, late]))
    assert files_below(store.uri) == before
    assert store.snapshot().version == 0


@pytest.mark.parametrize("call", [1, 40])
def test_a_disk_that_fails_while_rows_are_spilled_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    import vlm_dagster.engines.partition as partition

    store = HistoryStore.create(tmp_path, GROUP, 4, engine=LocalEngine(memory_limit="2MB"))
    before = files_below(store.uri)
    calls = iter(range(1, 1_000_000))
    original = partition.Partition.add

    def failing(self: partition.Partition, *args: object, **kwargs: object) -> None:
        if next(calls) >= call:
            raise OSError(28, "No space left on device")
        original(self, *args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(partition.Partition, "add", failing)
        with pytest.raises(StorageError, match=r"sorting failed.*No space left"):
            store.seal(day(0), events(200_000, 500))
    assert files_below(store.uri) == before
    assert store.seal(day(0), events(200_000, 500)).num_events == 200_000
