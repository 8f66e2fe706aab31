"""What sealing takes, what it refuses, and that a refusal leaves nothing behind."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from strategies import DAY_US, TIME, at, day, files_below

from vlm_dagster import FeatureGroup, HistoryStore, Projection, Trait
from vlm_dagster.engines.local import LocalEngine
from vlm_dagster.errors import InvalidEventsError, SchemaError, WindowError

GROUP = FeatureGroup("ratings", [Trait("item_id", pa.int64()), Trait("rating", pa.float32())])


@pytest.fixture
def store(tmp_path: Path) -> HistoryStore:
    return HistoryStore.create(tmp_path / "history", GROUP, 4)


def events(num: int = 10, *, number: int = 0, **columns: object) -> pa.Table:
    """Good events of one day; `columns` replace some of theirs."""
    table = {
        "user_id": pa.array([n % 3 for n in range(num)], pa.int64()),
        "event_id": pa.array(range(num), pa.int64()),
        "event_time": pa.array([at(number, n * 1_000_000) for n in range(num)], TIME),
        "item_id": pa.array(range(num), pa.int64()),
        "rating": pa.array([1.0] * num, pa.float32()),
    }
    return pa.table({**table, **columns})


def replaced(column: pa.Array | pa.ChunkedArray, row: int, value: object) -> pa.Array:
    values = (column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column).to_pylist()
    values[row] = value
    return pa.array(values, column.type)


def refused(
    store: HistoryStore, rows: object, error: type[Exception], *words: str, key: str = day(0)
) -> Exception:
    """Sealing these is refused with these words, and leaves no file and no version behind."""
    before, version = files_below(store.uri), store.snapshot().version
    with pytest.raises(error) as caught:
        store.seal(key, rows)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert files_below(store.uri) == before
    assert not list(Path(store.uri, "_staging").glob("*"))
    assert store.snapshot().version == version
    twin = pickle.loads(pickle.dumps(caught.value))
    assert str(twin) == str(caught.value)
    return caught.value


# -- what is taken --------------------------------------------------------------------------------


def as_parquet(table: pa.Table, folder: Path) -> str:
    path = folder / "events.parquet"
    pq.write_table(table, path, row_group_size=3)
    return str(path)


FORMS = {
    "table": lambda t, _: t,
    "one batch": lambda t, _: t.combine_chunks().to_batches()[0],
    "list of batches": lambda t, _: t.to_batches(max_chunksize=3),
    "generator of batches": lambda t, _: (b for b in t.to_batches(max_chunksize=3)),
    "generator of tables": lambda t, _: (t.slice(n, 5) for n in (0, 5)),
    "reader": lambda t, _: t.to_reader(max_chunksize=3),
    "polars": lambda t, _: pl.from_arrow(t),
    "parquet path": lambda t, f: as_parquet(t, f),
    "pathlib path": lambda t, f: Path(as_parquet(t, f)),
    "list of paths": lambda t, f: [as_parquet(t, f)],
    "file uri": lambda t, f: f"file://{as_parquet(t, f)}",
    "large strings and small integers": lambda t, _: t.set_column(
        3, "item_id", t["item_id"].cast(pa.int8())
    ),
    "dictionaries": lambda t, _: t.set_column(3, "item_id", pc.dictionary_encode(t["item_id"])),
    "seconds": lambda t, _: t.set_column(
        2, "event_time", t["event_time"].cast(pa.timestamp("s", "UTC"))
    ),
    "nanoseconds": lambda t, _: t.set_column(
        2, "event_time", t["event_time"].cast(pa.timestamp("ns", "+00:00"))
    ),
    "other column order": lambda t, _: t.select(t.column_names[::-1]),
}


@pytest.mark.parametrize("form", FORMS)
def test_events_may_come_in_any_form(store: HistoryStore, tmp_path: Path, form: str) -> None:
    plain = HistoryStore.create(tmp_path / "plain", GROUP, 4).seal(day(0), events())
    assert store.seal(day(0), FORMS[form](events(), tmp_path)).digest == plain.digest


@pytest.mark.parametrize(
    "nothing",
    [
        [],
        iter([]),
        events(0),
        events(0).to_reader(),
        pa.RecordBatchReader.from_batches(events(0).schema, []),
        pl.from_arrow(events(0)),
    ],
    ids=["list", "iterator", "table", "reader", "empty reader", "polars"],
)
def test_an_empty_window_is_sealed_as_empty(store: HistoryStore, nothing: object) -> None:
    sealed = store.seal(day(0), nothing)
    assert (sealed.num_events, sealed.num_users, sealed.num_bytes, sealed.reused) == (
        0,
        0,
        0,
        False,
    )
    assert store.snapshot().watermark_us == at(1)
    assert store.seal(day(0), events(0)).reused
    assert store.snapshot().read([1, 2]).num_events == 0


def test_a_header_only_parquet_file_is_an_empty_window(store: HistoryStore, tmp_path: Path) -> None:
    assert store.seal(day(0), as_parquet(events(0), tmp_path)).num_events == 0


def test_progress_counts_every_row(store: HistoryStore) -> None:
    seen: list[int] = []
    store.seal(day(0), events(10).to_batches(max_chunksize=4), progress=seen.append)
    assert sum(seen) == 10


def test_what_is_sealed_says_how_much(store: HistoryStore) -> None:
    sealed = store.seal(day(0), events(10))
    assert (sealed.num_events, sealed.num_users, sealed.num_duplicates) == (10, 3, 0)
    assert sealed.window.key == day(0)
    assert sealed.version == store.snapshot().version
    on_disk = [p for p in Path(store.uri).rglob("*.parquet") if p.parent.name.startswith("bucket=")]
    assert sealed.num_bytes == sum(path.stat().st_size for path in on_disk)
    again = store.seal(day(0), events(10))
    assert (again.reused, again.num_bytes, again.digest) == (True, 0, sealed.digest)


def test_the_first_instant_of_a_window_is_in_it_and_the_last_is_not(store: HistoryStore) -> None:
    times = pa.array([at(0), at(1) - 1], TIME)
    assert store.seal(day(0), events(2, event_time=times)).num_events == 2
    refused(store, events(1, event_time=pa.array([at(2)], TIME)), InvalidEventsError, key=day(1))


def test_a_default_stands_in_for_missing_values(tmp_path: Path) -> None:
    group = FeatureGroup(
        "ratings",
        [
            Trait("item_id", pa.int64(), missing=-1),
            Trait("rating", pa.float32(), missing=float("nan")),
        ],
    )
    store = HistoryStore.create(tmp_path, group, 1)
    nulls = pa.array([None] * 3)
    store.seal(day(0), events(3, item_id=nulls, rating=pa.array([1.0, None, 2.0], pa.float32())))
    read = HistoryStore.open(tmp_path).snapshot().read([1])
    assert read.columns["item_id"].to_pylist() == [-1]
    assert np.isnan(read.columns["rating"].to_numpy()[0])


# -- rows that are refused ------------------------------------------------------------------------

DROP = "Fill it or drop the row"


@pytest.mark.parametrize("column", ["user_id", "event_id", "event_time"])
def test_a_null_id_or_time_is_refused(store: HistoryStore, column: str) -> None:
    table = events(**{column: replaced(events()[column], 6, None)})
    error = refused(store, table, InvalidEventsError, "row 6", repr(column), "is null", DROP)
    assert (error.row, error.column, error.num_rows) == (6, column, 1)


@pytest.mark.parametrize("column", ["item_id", "rating"])
def test_a_null_trait_is_refused_unless_a_default_is_declared(
    store: HistoryStore, column: str
) -> None:
    table = events(**{column: replaced(events()[column], 6, None)})
    refused(store, table, InvalidEventsError, "row 6", repr(column), "is null", "missing=VALUE")


def test_rows_are_counted_over_all_batches(store: HistoryStore) -> None:
    table = events(user_id=replaced(events()["user_id"], 7, None))
    refused(store, table.to_batches(max_chunksize=3), InvalidEventsError, "row 7")


def test_rows_of_files_are_counted_within_the_file(store: HistoryStore, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.parquet", tmp_path / "bad.parquet"
    pq.write_table(events(5), good)
    pq.write_table(events(user_id=replaced(events()["user_id"], 7, None)), bad)
    refused(store, [good, bad], InvalidEventsError, "row 7", "bad.parquet")


def test_an_event_of_another_window_is_refused_and_sent_there(store: HistoryStore) -> None:
    table = events(event_time=replaced(events()["event_time"], 4, at(2)))
    refused(
        store, table, InvalidEventsError, "row 4", "event_time", "1997-09-22T00:00:00Z",
        f"outside window {day(0)}", f"belongs to window {day(2)}", "availability='recorded'",
    )  # fmt: skip


@pytest.mark.parametrize("time", [10**18, 2**62])
def test_a_time_of_the_wrong_unit_is_refused(store: HistoryStore, time: int) -> None:
    table = events(event_time=replaced(events()["event_time"], 4, time))
    refused(store, table, InvalidEventsError, "row 4", "check its unit")


def test_a_time_before_1970_is_refused(store: HistoryStore) -> None:
    table = events(event_time=replaced(events()["event_time"], 4, -1))
    refused(store, table, InvalidEventsError, "row 4", "before 1970", "-1")


def test_digits_below_microseconds_are_refused(store: HistoryStore) -> None:
    times = events()["event_time"].cast(pa.timestamp("ns", "UTC")).cast(pa.int64()).to_pylist()
    times[3] += 1
    table = events(event_time=pa.array(times, pa.timestamp("ns", "UTC")))
    refused(store, table, InvalidEventsError, "row 3", "precision", str(times[3]), "Round it")


def test_seconds_too_far_off_are_refused(store: HistoryStore) -> None:
    times = pa.array([10**15] * 10, pa.timestamp("s", "UTC"))
    refused(store, events(event_time=times), InvalidEventsError, "row 0", str(10**15), "unit")


# -- columns that are refused ---------------------------------------------------------------------


def test_naive_times_are_refused(store: HistoryStore) -> None:
    naive = events()["event_time"].cast(pa.timestamp("us"))
    refused(
        store,
        events(event_time=naive),
        SchemaError,
        "'event_time'",
        "no time zone",
        "assume_timezone",
    )


def test_times_of_another_zone_are_refused(store: HistoryStore) -> None:
    zoned = events()["event_time"].cast(pa.timestamp("us", "America/Sao_Paulo"))
    refused(store, events(event_time=zoned), SchemaError, "'event_time'", "Sao_Paulo", "UTC")


@pytest.mark.parametrize("kind", [pa.int64(), pa.string(), pa.float64(), pa.date32()])
def test_times_that_are_no_timestamps_are_refused(store: HistoryStore, kind: pa.DataType) -> None:
    times = pa.array([None] * 10, kind)
    refused(store, events(event_time=times), SchemaError, "'event_time'", str(kind), "unit")


@pytest.mark.parametrize("column", ["user_id", "event_id", "event_time", "item_id"])
def test_a_missing_column_is_refused(store: HistoryStore, column: str) -> None:
    for table in (events().drop_columns([column]), events(0).drop_columns([column])):
        refused(store, table, SchemaError, repr(column), "missing", "add or rename")
        refused(store, table.to_reader(), SchemaError, repr(column), "missing")
        refused(store, pl.from_arrow(table), SchemaError, repr(column), "missing")


def test_a_missing_column_is_refused_even_where_no_batch_comes(store: HistoryStore) -> None:
    schema = events().drop_columns(["item_id"]).schema
    refused(store, pa.RecordBatchReader.from_batches(schema, []), SchemaError, "'item_id'")


def test_a_header_only_file_with_other_columns_is_refused(
    store: HistoryStore, tmp_path: Path
) -> None:
    path = as_parquet(events(0).rename_columns(["user", *events().column_names[1:]]), tmp_path)
    refused(store, path, SchemaError, "'user_id'", path)


def test_an_undeclared_column_is_refused(store: HistoryStore) -> None:
    refused(
        store, events(extra=pa.array([0] * 10)), SchemaError, "'extra'", "not declared", "Drop it"
    )


def test_a_column_that_stands_twice_is_refused(store: HistoryStore) -> None:
    table = events().append_column("item_id", pa.array(range(10)))
    refused(store, table, SchemaError, "'item_id'", "twice")


def test_availability_has_to_be_declared(store: HistoryStore) -> None:
    table = events(available_at=events()["event_time"])
    refused(store, table, SchemaError, "available_at", "availability='recorded'")


def test_declared_availability_has_to_come(tmp_path: Path) -> None:
    group = FeatureGroup("ratings", GROUP.traits, availability="recorded")
    store = HistoryStore.create(tmp_path, group, 1)
    refused(store, events(), SchemaError, "available_at", "availability='event_time'")


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ("item_id", pa.uint64()), ("item_id", pa.float64()), ("item_id", pa.string()),
        ("item_id", pa.bool_()), ("rating", pa.float64()), ("rating", pa.int32()),
        ("rating", pa.string()), ("user_id", pa.uint64()), ("user_id", pa.string()),
        ("user_id", pa.float32()), ("event_id", pa.list_(pa.int64())),
    ],
)  # fmt: skip
def test_types_that_may_lose_values_are_refused(
    store: HistoryStore, column: str, kind: pa.DataType
) -> None:
    table = events(**{column: pa.array([None] * 10, kind)})
    refused(store, table, SchemaError, repr(column), str(kind), "lose values")


@pytest.mark.parametrize(
    "rows",
    [
        42,
        None,
        [{"user_id": 1}],
        {"user_id": [1]},
        ["there/is/none.parquet"],
        "there/is/none.parquet",
    ],
    ids=str,
)
def test_what_is_no_table_is_refused(store: HistoryStore, rows: object) -> None:
    refused(store, rows, SchemaError)


def test_a_file_that_is_cut_short_is_refused(store: HistoryStore, tmp_path: Path) -> None:
    path = Path(as_parquet(events(), tmp_path))
    path.write_bytes(path.read_bytes()[:-20])
    refused(store, path, SchemaError, str(path), "Check the file")
    path.write_bytes(b"")
    refused(store, path, SchemaError, str(path), "Check the file")
    refused(store, tmp_path, SchemaError, str(tmp_path))


def test_an_error_of_the_source_comes_out_as_it_is(store: HistoryStore) -> None:
    def source() -> Iterator[pa.RecordBatch]:
        yield events().to_batches()[0]
        raise ZeroDivisionError("the source broke")

    refused(store, source(), ZeroDivisionError, "the source broke")


# -- duplicates -----------------------------------------------------------------------------------


def with_repeats(num: int, repeats: dict[int, int]) -> pa.Table:
    """Events whose rows `repeats.keys()` repeat the user and id of other rows, at their own time."""
    table = events(num)
    rows = np.arange(num)
    rows[list(repeats)] = list(repeats.values())
    for name in ("user_id", "event_id"):
        table = table.set_column(table.column_names.index(name), name, table[name].take(rows))
    return table


def test_a_repeated_event_is_refused_with_its_row_and_user(store: HistoryStore) -> None:
    refused(
        store, with_repeats(10, {9: 0}), InvalidEventsError,
        "row 9", "'event_id'", "a second time", "user 0", "duplicates='first'",
    )  # fmt: skip


def test_the_number_of_repeated_events_is_told(store: HistoryStore) -> None:
    error = refused(store, with_repeats(9, {6: 0, 7: 0, 8: 0}), InvalidEventsError, "row 6")
    assert error.num_rows == 3


def test_a_refusal_after_many_users_leaves_no_file_of_theirs(store: HistoryStore) -> None:
    table = events(50, user_id=pa.array(range(50)))
    for n in range(0, 50, 5):  # in whichever bucket the repeated user is
        refused(store, pa.concat_tables([table, table.slice(n, 1)]), InvalidEventsError, "row 50")


def test_the_first_of_repeated_events_is_kept_and_the_rest_are_counted(tmp_path: Path) -> None:
    group = FeatureGroup("ratings", GROUP.traits, duplicates="first")
    store = HistoryStore.create(tmp_path, group, 2)
    # Row 9 has the id of row 0, another item and a later time; rows 3 and 6 are row 0's too.
    sealed = store.seal(day(0), with_repeats(10, {3: 0, 6: 0, 9: 0}).to_batches(max_chunksize=2))
    assert (sealed.num_events, sealed.num_duplicates) == (7, 3)
    read = store.snapshot().read([0], Projection(["event_id", "item_id"]))
    assert read.columns["event_id"].to_pylist() == [0]
    assert read.columns["item_id"].to_pylist() == [0]


def test_the_first_is_by_input_order_even_if_its_time_is_later(tmp_path: Path) -> None:
    group = FeatureGroup("ratings", GROUP.traits, duplicates="first")
    store = HistoryStore.create(tmp_path, group, 2)
    table = with_repeats(10, {9: 0}).take(list(range(9, -1, -1)))
    assert store.seal(day(0), table).num_duplicates == 1
    read = store.snapshot().read([0], Projection(["event_id", "item_id"]))
    assert dict(zip(*(c.to_pylist() for c in read.columns.values()), strict=True))[0] == 9


def test_repeats_are_found_a_day_and_many_sorted_batches_apart(tmp_path: Path) -> None:
    num = 300_000  # DuckDB hands sorted rows over by 122,880
    group = FeatureGroup("ratings", GROUP.traits, duplicates="first")
    table = events(
        num,
        user_id=pa.array(np.zeros(num, np.int64)),
        event_time=pa.array(at(0) + np.arange(num) * (DAY_US // num)).cast(TIME),
        event_id=pa.array(np.where(np.arange(num) == num - 1, 0, np.arange(num))),
    )
    sealed = HistoryStore.create(tmp_path / "first", group, 1).seal(day(0), table)
    assert (sealed.num_events, sealed.num_duplicates) == (num - 1, 1)
    store = HistoryStore.create(tmp_path / "refuse", GROUP, 1)
    refused(store, table, InvalidEventsError, f"row {num - 1:d}")


def test_two_users_may_have_events_of_one_id(store: HistoryStore) -> None:
    table = events(4, user_id=pa.array([1, 2, 3, 4]), event_id=pa.array([5, 5, 5, 5]))
    assert store.seal(day(0), table).num_events == 4


# -- windows that are refused ---------------------------------------------------------------------


def test_a_window_before_the_first_is_refused(store: HistoryStore) -> None:
    store.seal(day(3), events(number=3))
    refused(store, events(), WindowError, day(0), f"before the first window {day(3)}", "start=")


def test_a_window_before_the_declared_start_is_refused(tmp_path: Path) -> None:
    store = HistoryStore.create(tmp_path, GROUP, 2, start=day(2))
    refused(store, events(), WindowError, f"before the first window {day(2)}", f"start={day(0)!r}")


def test_a_key_off_the_grid_is_refused(store: HistoryStore) -> None:
    refused(store, events(), WindowError, "not a daily key", key="20.9.1997")


@pytest.mark.parametrize("num_buckets", [0, -1, 1.5, True, 65_537, "4", None])
def test_a_number_of_buckets_that_cannot_be_is_refused(tmp_path: Path, num_buckets: object) -> None:
    with pytest.raises(SchemaError, match="num_buckets"):
        HistoryStore.create(tmp_path / "history", GROUP, num_buckets)  # type: ignore[arg-type]
    assert not (tmp_path / "history").exists()


# -- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "users", [["1"], [1.0], [2**70], [1, "a"], [None], np.array([1.5]), pa.array(["1"]), [True]]
)
def test_asking_for_users_of_another_type_is_refused(store: HistoryStore, users: object) -> None:
    store.seal(day(0), events())
    with pytest.raises(SchemaError):
        store.snapshot().read(users)


@pytest.mark.parametrize(
    "users",
    [[1, 9], (1, 9), np.array([1, 9]), np.array([1, 9], np.int8), pa.array([1, 9]),
     pa.chunked_array([[1], [9]]), pa.array([1, 9], pa.uint32()), pa.array([1, 9]).dictionary_encode()],
    ids=lambda u: type(u).__name__,
)  # fmt: skip
def test_users_may_be_asked_for_in_any_form(store: HistoryStore, users: object) -> None:
    store.seal(day(0), events())
    assert store.snapshot().read(users).lengths.tolist() == [3, 0]
    assert store.snapshot().count(users).tolist() == [3, 0]


@pytest.mark.parametrize("nobody", [[], np.array([], np.int64), pa.array([], pa.int64())])
def test_nobody_may_be_asked_for(store: HistoryStore, nobody: object) -> None:
    store.seal(day(0), events())
    read = store.snapshot().read(nobody)
    assert read.offsets.tolist() == [0]
    assert read.columns["item_id"].type == pa.int64()


# -- spilling -------------------------------------------------------------------------------------


def test_more_rows_than_memory_are_sealed_to_the_same_content(tmp_path: Path) -> None:
    num = 600_000
    order = np.random.default_rng(0).permutation(num)
    table = events(
        num,
        user_id=pa.array(order % 1000),
        event_time=pa.array(at(0) + order).cast(TIME),
        event_id=pa.array(order),
    )
    small = LocalEngine(memory_limit="32MB", threads=1)
    spilled = HistoryStore.create(tmp_path / "small", GROUP, 2, engine=small).seal(day(0), table)
    plain = HistoryStore.create(tmp_path / "plain", GROUP, 2).seal(day(0), table)
    assert spilled.digest == plain.digest
    assert not list((tmp_path / "small" / "_staging").glob("*"))
