"""Readers take what users have, in a stream, and name the line and the value of what is wrong."""

from __future__ import annotations

import datetime as dt
import gzip
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_dagster.errors import SchemaError, SourceFormatError
from vlm_dagster.events import (
    BinaryLabel,
    EventSource,
    content_ids,
    input_schema,
    lines,
    open_source,
)
from vlm_dagster.events.taobao import TAOBAO_ACTIONS
from vlm_dagster.schema import TIME_TYPE

RATINGS = [(196, 242, 3.0, 881250949), (186, 302, 3.5, 891717742), (22, 377, 1.0, 878887116)]
GLOBO_HEADER = (
    "user_id,session_id,session_start,session_size,click_article_id,click_timestamp,"
    "click_environment,click_deviceGroup,click_os,click_country,click_region,click_referrer_type"
)
GLOBO_ROW = "0,1506825423271737,1506825423000,2,157541,1506826828020,4,3,20,1,20,2"


def udata(rows: Sequence[tuple[int, int, float, int]], end: str = "\n") -> str:
    return "".join(f"{u}\t{i}\t{r:g}\t{t}{end}" for u, i, r, t in rows)


def ratings_dat(rows: Sequence[tuple[int, int, float, int]], end: str = "\n") -> str:
    return "".join(f"{u}::{i}::{r:g}::{t}{end}" for u, i, r, t in rows)


def ratings_csv(rows: Sequence[tuple[int, int, float, int]], end: str = "\n") -> str:
    body = "".join(f"{u},{i},{r},{t}{end}" for u, i, r, t in rows)
    return f"userId,movieId,rating,timestamp{end}{body}"


def taobao(rows: Sequence[tuple[int, int, float, int]], end: str = "\n") -> str:
    return "".join(f"{u},{i},7,pv,{t}{end}" for u, i, _, t in rows)


SHAPES: dict[str, tuple[str, Callable[..., str]]] = {
    "u.data": ("movielens", udata),
    "ratings.dat": ("movielens", ratings_dat),
    "ratings.csv": ("movielens", ratings_csv),
    "UserBehavior.csv": ("taobao", taobao),
}


def put(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def read(source: EventSource) -> pa.Table:
    table = pa.Table.from_batches(source.batches(), input_schema(source.group))
    table.validate(full=True)
    return table


def refused(path: object, kind: str, **options: object) -> SourceFormatError:
    with pytest.raises(SourceFormatError) as caught:
        read(open_source(path, kind, **options))  # type: ignore[arg-type]
    return caught.value


class TestMovieLens:
    @pytest.mark.parametrize("name", ["u.data", "ratings.dat", "ratings.csv"])
    def test_every_shape_gives_the_same_events(self, tmp_path: Path, name: str) -> None:
        source = open_source(put(tmp_path, "any-name", SHAPES[name][1](RATINGS)), "movielens")
        table = read(source)
        assert source.group.name == "ratings"
        assert table["user_id"].to_pylist() == [196, 186, 22]
        assert table["item_id"].to_pylist() == [242, 302, 377]
        assert table["rating"].to_pylist() == [3.0, 3.5, 1.0]
        assert table["event_time"].cast(pa.int64()).to_pylist() == [t * 10**6 for *_, t in RATINGS]
        reference = put(tmp_path, "u.data", udata(RATINGS))
        assert table.equals(read(open_source(reference, "movielens")))

    def test_the_label_is_a_rating_of_four_or_more(self, tmp_path: Path) -> None:
        rows = [(1, i, r, 881250949) for i, r in enumerate([0.5, 3.5, 4.0, 5.0])]
        source = open_source(put(tmp_path, "u.data", udata(rows)), "movielens")
        assert source.label is not None
        labels = source.label.apply(read(source))
        assert labels.type == pa.int8()
        assert labels.to_pylist() == [0, 0, 1, 1]

    def test_a_folder_finds_its_ratings(self, tmp_path: Path) -> None:
        put(tmp_path, "u.data.gz", gzip.compress(udata(RATINGS).encode()))
        put(tmp_path, "u.item", "1|Toy Story")
        assert read(open_source(tmp_path, "movielens")).num_rows == 3

    @pytest.mark.parametrize(
        ("text", "line", "value", "says"),
        [
            ("1\t2\t3\t881250949\n1\t2\t3\n", 2, "1\t2\t3", "3 fields, but 4 are expected"),
            ("1\t2\t3\t881250949\n\n1\tx\t3\t881250949\n", 3, "x", "'movieId' is not a whole"),
            ("1\t2\tgood\t881250949\n", 1, "good", "'rating' is not a number"),
            ("1\t2\tnan\t881250949\n", 1, None, "rating from 0.5 to 5"),
            ("1\t2\t3\t881250949\n1\t2\t9\t881250949\n", 2, 9.0, "rating from 0.5 to 5"),
            ("1\t2\t3\t881250949\n1\t2\t3\t-5\n", 2, -5, "is a negative time"),
            ("1\t2\t3\t881250949000\n", 1, 881250949000, "finer unit"),
            ("1\t\t3\t881250949\n", 1, "", "'movieId' is not a whole"),
            ("user\titem\trating\ttime\n", 1, "user", "'userId' is not a whole"),
            ("a,b,c\n", 1, "a,b,c", "not a MovieLens ratings file"),
            ("1,2,3,881250949\n", 1, "1,2,3,881250949", "not a MovieLens ratings file"),
            ("userId,movieId,rating,timestamp\n", None, None, "not a single rating"),
            ("99999999999999999999\t2\t3\t881250949\n", 1, "99999999999999999999", "of 64 bits"),
        ],
    )
    def test_a_bad_line_is_named(
        self, tmp_path: Path, text: str, line: int | None, value: object, says: str
    ) -> None:
        error = refused(put(tmp_path, "u.data", text), "movielens")
        assert says in str(error)
        assert error.line == line
        assert error.file == str(tmp_path / "u.data")
        if says != "rating from 0.5 to 5" or value is not None:
            assert error.value == value


class TestTaobao:
    def test_the_four_behaviours_become_codes(self, tmp_path: Path) -> None:
        text = "".join(f"1,{i},9,{b},1511658000\n" for i, b in enumerate(TAOBAO_ACTIONS))
        source = open_source(put(tmp_path, "UserBehavior.csv", text), "taobao")
        table = read(source)
        assert table["action"].to_pylist() == [0, 1, 2, 3]
        assert table["action"].type == pa.int8()
        assert source.label is not None
        assert source.label.apply(table).to_pylist() == [0, 1, 1, 1]

    def test_an_unknown_behaviour_is_named(self, tmp_path: Path) -> None:
        text = "1,2,9,pv,1511658000\n1,2,9,steal,1511658000\n"
        error = refused(put(tmp_path, "x.csv", text), "taobao")
        assert (error.line, error.value) == (2, "steal")
        assert "pv, fav, cart, buy" in str(error)


class TestGlobo:
    def test_hours_are_read_in_order_and_an_empty_hour_is_fine(self, tmp_path: Path) -> None:
        put(tmp_path, "clicks_hour_001.csv", f"{GLOBO_HEADER}\n{GLOBO_ROW}\n")
        later = GLOBO_ROW.replace("157541", "7")
        put(
            tmp_path, "clicks_hour_002.csv.gz", gzip.compress(f"{GLOBO_HEADER}\n{later}\n".encode())
        )
        put(tmp_path, "clicks_hour_000.csv", f"{GLOBO_HEADER}\n")
        put(tmp_path, "clicks_hour_003.csv", GLOBO_HEADER)
        put(tmp_path, "readme.txt", "not a click")
        source = open_source(tmp_path, "globo")
        table = read(source)
        assert source.label is None
        assert table["item_id"].to_pylist() == [157541, 7]
        assert table["event_time"].cast(pa.int64()).to_pylist() == [1506826828020000] * 2
        assert table.column("os").to_pylist() == [20, 20]
        assert {table[n].type for n in ("environment", "device_group", "os")} == {pa.int8()}

    def test_columns_are_found_by_name(self, tmp_path: Path) -> None:
        names, values = GLOBO_HEADER.split(","), GLOBO_ROW.split(",")
        turned = f"{','.join(reversed(names))}\n{','.join(reversed(values))}\n"
        plain = read(open_source(put(tmp_path, "a.csv", f"{GLOBO_HEADER}\n{GLOBO_ROW}\n"), "globo"))
        assert read(open_source(put(tmp_path, "b.csv", turned), "globo")).equals(plain)

    def test_a_code_that_does_not_fit_is_refused_not_wrapped(self, tmp_path: Path) -> None:
        row = GLOBO_ROW.replace(",20,1,20,2", ",300,1,20,2")
        path = put(tmp_path, "clicks_hour_000.csv", f"{GLOBO_HEADER}\n{GLOBO_ROW}\n{row}\n")
        error = refused(path, "globo")
        assert (error.line, error.value) == (3, "300")
        assert "'click_os' is not a whole number of 8 bits (-128 to 127)" in str(error)

    def test_a_missing_column_is_named(self, tmp_path: Path) -> None:
        path = put(tmp_path, "clicks_hour_000.csv", GLOBO_HEADER.replace("click_os,", "") + "\n")
        assert "lacks click_os" in str(refused(path, "globo"))

    def test_one_bad_hour_of_many_is_named(self, tmp_path: Path) -> None:
        for hour in range(3):
            put(tmp_path, f"clicks_hour_{hour:03}.csv", f"{GLOBO_HEADER}\n{GLOBO_ROW}\n")
        put(tmp_path, "clicks_hour_001.csv", b"")
        error = refused(tmp_path, "globo")
        assert error.file.endswith("clicks_hour_001.csv")
        assert "the file is empty" in str(error)


class TestCutLines:
    rows = tuple((301780, 543546 + i, 3.0, 1511658000 + i) for i in range(5))

    @pytest.mark.parametrize("name", SHAPES)
    def test_wherever_the_last_line_is_cut_it_is_noticed(self, tmp_path: Path, name: str) -> None:
        kind, write = SHAPES[name]
        text = write(self.rows).rstrip("\n")
        last = len(text) - text.rfind("\n") - 1
        whole = read(open_source(put(tmp_path, name, text), kind))  # only the line end is lost
        assert whole.num_rows == 5
        for num_lost in range(1, last):
            path = put(tmp_path, name, text[:-num_lost])
            error = refused(path, kind)
            assert error.line == text.count("\n") + 1
            assert error.value == text[:-num_lost].rpartition("\n")[2]
            assert 'on_cut_line="drop"' in str(error)
            source = open_source(path, kind, on_cut_line="drop")
            assert read(source).equals(whole.slice(0, 4))
            assert source.num_dropped == 1

    def test_dropping_applies_to_the_last_line_only(self, tmp_path: Path) -> None:
        text = taobao(self.rows).replace("543547,7,pv,1511658001", "543547,7,pv")
        error = refused(put(tmp_path, "u.csv", text), "taobao", on_cut_line="drop")
        assert error.line == 2

    def test_a_bad_last_line_with_a_line_end_was_not_cut(self, tmp_path: Path) -> None:
        error = refused(
            put(tmp_path, "u.csv", taobao(self.rows) + "1,2\n"), "taobao", on_cut_line="drop"
        )
        assert error.line == 6


class TestAnyText:
    def test_compression_is_told_by_content(self, tmp_path: Path) -> None:
        text = udata(RATINGS).encode()
        plain = read(open_source(put(tmp_path, "a", text), "movielens"))
        for codec in ("gzip", "bz2", "zstd", "lz4"):
            with pa.output_stream(tmp_path / "b", compression=codec) as stream:
                stream.write(text)
            source = open_source(tmp_path / "b", "movielens")
            assert read(source).equals(plain), codec

    def test_line_ends_and_byte_order_marks_do_not_matter(self, tmp_path: Path) -> None:
        plain = read(open_source(put(tmp_path, "a", ratings_csv(RATINGS)), "movielens"))
        windows = "\ufeff" + ratings_csv(RATINGS, "\r\n")
        assert read(open_source(put(tmp_path, "b", windows), "movielens")).equals(plain)

    def test_blocks_of_any_size_give_the_same_rows(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = [(u, u * 7 % 50, 4.0, 881250949 + u) for u in range(200)]
        path = put(tmp_path, "r.csv", ratings_csv(rows).rstrip("\n"))
        whole = read(open_source(path, "movielens"))
        for size in (1, 7, 64, 1000):
            monkeypatch.setattr(lines, "_BLOCK_BYTES", size)
            assert read(open_source(path, "movielens")).equals(whole)

    @given(
        bad=st.integers(0, 39), block=st.sampled_from([16, 100, 1 << 20]), empty=st.sets(st.integers(0, 39)),
        what=st.sampled_from(["1\t2\t3", "1\t2\tx\t881250949", "1\t2\t3\t-1", "1\t2\t3\t4\t5"]),
        end=st.sampled_from(["\n", "\r\n"]),
    )  # fmt: skip
    def test_a_bad_line_is_named_wherever_it_is(
        self, tmp_path_factory: pytest.TempPathFactory, bad: int, block: int, empty: set[int],
        what: str, end: str,
    ) -> None:  # fmt: skip
        good = "1\t2\t3\t881250949"
        text = [what if n == bad else "" if n in empty and n > 0 else good for n in range(40)]
        if bad == 0:
            text.insert(0, good)
        path = put(tmp_path_factory.mktemp("bad"), "u.data", end.join(text) + end)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lines, "_BLOCK_BYTES", block)
            error = refused(path, "movielens")
        assert error.line == bad + (2 if bad == 0 else 1)

    @pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
    def test_a_cut_gzip_stream_is_refused(self, tmp_path: Path, kept: float) -> None:
        rows = [(u, u * 7919 % 5003, 4.0, 881250949 + u) for u in range(20_000)]
        packed = gzip.compress(udata(rows).encode())
        path = put(tmp_path, "u.data.gz", packed[: int(len(packed) * kept)])
        error = refused(path, "movielens", on_cut_line="drop")
        assert "gzip stream is cut off or damaged" in str(error)
        assert error.line is not None

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"", "the file is empty"),
            (b"PK\x03\x04...", "zip archive"),
            (b"PAR1....", "Parquet file"),
            ("1\t2\t3\t4\n".encode("utf-16"), "UTF-16"),
            (b"caf\xe9\t2\t3\t4\n", "not UTF-8"),
        ],
    )
    def test_what_is_not_text_is_called_by_its_name(
        self, tmp_path: Path, content: bytes, says: str
    ) -> None:
        assert says in str(refused(put(tmp_path, "u.data", content), "movielens"))

    def test_bytes_that_are_not_utf8_are_named_by_line(self, tmp_path: Path) -> None:
        text = b"1,2,9,pv,1511658000\n1,2,9,p\xff,1511658000\n"
        error = refused(put(tmp_path, "u.csv", text), "taobao")
        assert error.line == 2
        assert "not UTF-8" in str(error)

    def test_paths_that_lead_nowhere_are_refused(self, tmp_path: Path) -> None:
        assert "no such file" in str(refused(tmp_path / "gone.csv", "taobao"))
        assert "holds no clicks_hour_*.csv" in str(refused(tmp_path, "globo"))
        assert "list of paths is empty" in str(refused([], "globo"))

    def test_a_file_beside_its_compressed_self_is_refused(self, tmp_path: Path) -> None:
        put(tmp_path, "u.data", udata(RATINGS))
        put(tmp_path, "u.data.gz", gzip.compress(udata(RATINGS).encode()))
        assert "count twice" in str(refused(tmp_path, "movielens"))

    def test_progress_counts_the_stored_bytes_to_the_end(self, tmp_path: Path) -> None:
        rows = [(u, u * 7 % 50, 4.0, 881250949 + u) for u in range(1000)]
        paths = [
            put(tmp_path, "u.data", udata(rows)),
            put(tmp_path, "v.data.gz", gzip.compress(udata(rows).encode())),
        ]
        source = open_source(paths, "movielens")
        seen: list[int] = []
        num_rows = sum(batch.num_rows for batch in source.batches(seen.append))
        assert num_rows == 2000
        assert seen == sorted(seen)
        assert seen[-1] == source.num_bytes == sum(path.stat().st_size for path in paths)

    def test_a_large_file_is_read_in_bounded_memory(self, tmp_path: Path) -> None:
        block = udata([(u, u * 7 % 50, 4.0, 881250949 + u) for u in range(200_000)]).encode()
        path = put(tmp_path, "u.data.gz", b"".join(gzip.compress(block, 1) for _ in range(10)))
        before, most, num_rows = pa.total_allocated_bytes(), 0, 0
        for batch in open_source(path, "movielens").batches():
            num_rows += batch.num_rows
            most = max(most, pa.total_allocated_bytes() - before)
        assert num_rows == 2_000_000
        assert most < 48 << 20


class TestEventIds:
    @given(st.permutations(range(30)))
    def test_ids_follow_from_content_not_from_place(self, order: list[int]) -> None:
        users, names = (
            pa.array(range(30)),
            pa.array([f"item {n}" * (n % 4) + str(n) for n in range(30)]),
        )
        ids = content_ids([users, names])
        moved = content_ids([users.take(pa.array(order)), names.take(pa.array(order))])
        assert moved.equals(ids.take(pa.array(order)))
        assert len(set(ids.to_pylist())) == 30

    def test_ids_never_change(self) -> None:
        ids = content_ids(
            [pa.array([196, 186]), pa.array([3.0, 3.5], pa.float32()), pa.array(["a", None])]
        )
        # Stored events carry these ids: another value needs a new format version.
        assert ids.to_pylist() == [-7053869522930513760, -3011074859310767873]

    def test_null_is_not_zero_and_columns_do_not_swap(self) -> None:
        one = content_ids([pa.array([0, None, 1, 2]), pa.array([0, 0, 2, 1])]).to_pylist()
        assert len(set(one)) == 4

    def test_ids_do_not_grow_with_the_item(self, tmp_path: Path) -> None:
        rows = [(5, item, 4.0, 881250949) for item in range(1, 1001)]
        table = read(open_source(put(tmp_path, "u.data", udata(rows)), "movielens"))
        ids = table["event_id"].to_numpy()
        assert abs(np.corrcoef(ids.argsort().argsort(), np.arange(1000))[0, 1]) < 0.1

    def test_repeated_rows_share_an_id_and_the_first_is_kept(self, tmp_path: Path) -> None:
        source = open_source(put(tmp_path, "u.data", udata([*RATINGS, RATINGS[0]])), "movielens")
        ids = read(source)["event_id"].to_pylist()
        assert ids[0] == ids[3]
        assert len(set(ids)) == 3
        assert source.group.duplicates == "first"


def parquet(folder: Path, **columns: pa.Array) -> Path:
    path = folder / "events.parquet"
    pq.write_table(pa.table(columns), path)
    return path


UTC = pa.array([1_700_000_000_000_000, 1_700_000_000_500_000], TIME_TYPE)


class TestMappedColumns:
    def test_parquet_columns_are_renamed_and_the_rest_become_traits(self, tmp_path: Path) -> None:
        path = parquet(
            tmp_path, uid=pa.array(["a", "b"]), ts=UTC, item_id=pa.array([1, 2], pa.uint32()),
            price=pa.array([1.5, 2.5], pa.float32()),
        )  # fmt: skip
        source = open_source(path, "parquet", mapping={"user_id": "uid", "event_time": "ts"})
        assert str(source.group.user_id) == "string"
        assert {t.name: str(t.type) for t in source.group.traits} == {
            "item_id": "int64",
            "price": "float",
        }
        table = read(source)
        assert table["user_id"].to_pylist() == ["a", "b"]
        assert table["event_time"].combine_chunks().equals(UTC)
        assert source.group.duplicates == "first"  # ids were made from the content

    def test_csv_gives_the_same_events_as_parquet(self, tmp_path: Path) -> None:
        columns = {"user_id": pa.array([1, 2]), "event_id": pa.array([7, 8]), "event_time": UTC,
                   "available_at": UTC, "item_id": pa.array([3, None])}  # fmt: skip
        text = (
            "item_id,user_id,event_id,event_time,available_at\n"
            "3,1,7,2023-11-14T22:13:20Z,2023-11-14T22:13:20.000Z\n"
            ",2,8,2023-11-14T23:13:20.5+01:00,2023-11-14T22:13:20.500Z\n"
        )
        left = open_source(parquet(tmp_path, **columns), "parquet", group="clicks")
        right = open_source(put(tmp_path, "a.csv", text), "csv", group="clicks")
        assert left.group == right.group
        assert left.group.availability == "recorded"
        assert left.group.duplicates == "refuse"
        assert read(left).equals(read(right))
        assert read(right)["item_id"].to_pylist() == [3, None]  # the store refuses it, by row

    @pytest.mark.parametrize("kind", ["parquet", "csv"])
    def test_a_unit_is_never_guessed(self, tmp_path: Path, kind: str) -> None:
        seconds = [1_700_000_000, 1_700_000_001]
        path = (
            parquet(tmp_path, user_id=pa.array([1, 2]), event_time=pa.array(seconds))
            if kind == "parquet"
            else put(tmp_path, "a.csv", f"user_id,event_time\n1,{seconds[0]}\n2,{seconds[1]}\n")
        )
        message = str(refused(path, kind))
        assert "2023-11-14T22:13:20Z if s" in message
        assert "1970-01-20T16:13:20Z if ms" in message
        assert "time_unit" in message
        table = read(open_source(path, kind, time_unit="s"))
        assert table["event_time"].to_pylist()[0] == dt.datetime(
            2023, 11, 14, 22, 13, 20, tzinfo=dt.UTC
        )
        assert "after the year 9999" not in message

    def test_a_unit_too_coarse_is_refused(self, tmp_path: Path) -> None:
        path = parquet(
            tmp_path, user_id=pa.array([1, 2]), event_time=pa.array([1, 1_700_000_000_000])
        )
        error = refused(path, "parquet", time_unit="s")
        assert "row 1 (from 0)" in str(error)
        assert "finer unit" in str(error)

    def test_fractions_of_seconds_are_kept(self, tmp_path: Path) -> None:
        path = parquet(tmp_path, user_id=pa.array([1]), event_time=pa.array([1_700_000_000.25]))
        table = read(open_source(path, "parquet", time_unit="s"))
        assert table["event_time"].cast(pa.int64()).to_pylist() == [1_700_000_000_250_000]

    def test_timestamps_without_a_zone_need_a_word(self, tmp_path: Path) -> None:
        text = "user_id,event_time\n1,2023-11-14 22:13:20\n"
        path = put(tmp_path, "a.csv", text)
        assert "assume_utc=True" in str(refused(path, "csv"))
        table = read(open_source(path, "csv", assume_utc=True))
        assert table["event_time"].cast(pa.int64()).to_pylist() == [1_700_000_000_000_000]

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"mapping": {"user_id": "who"}}, "no column 'who' (mapped to 'user_id')"),
            ({"traits": ["colour"]}, "no column 'colour' for trait 'colour'"),
            ({"types": {"item_id": pa.decimal128(5)}}, "cannot be stored"),
            ({"label": BinaryLabel("liked", 1)}, "has no trait 'liked'"),
            ({"time_unit": "ns"}, "time_unit='ns' is unknown"),
            ({"traits": "item_id"}, "is one string"),
            ({"delimiter": "::"}, "not one character"),
        ],
    )
    def test_options_that_do_not_fit_are_refused(
        self, tmp_path: Path, options: dict[str, object], says: str
    ) -> None:
        path = put(tmp_path, "a.csv", "user_id,event_time,item_id\n1,2023-11-14T22:13:20Z,5\n")
        with pytest.raises((SchemaError, SourceFormatError)) as caught:
            open_source(path, "csv", **options)  # type: ignore[arg-type]
        assert says in str(caught.value)

    def test_a_column_that_cannot_be_a_name_asks_for_one(self, tmp_path: Path) -> None:
        text = "user_id,event_time,Item ID\n1,2023-11-14T22:13:20Z,5\n"
        path = put(tmp_path, "a.csv", text)
        assert "mapping={'my_trait': 'Item ID'}" in str(refused(path, "csv"))
        source = open_source(path, "csv", mapping={"item_id": "Item ID"})
        assert read(source)["item_id"].to_pylist() == [5]
        assert read(open_source(path, "csv", traits=[])).num_columns == 3

    def test_a_type_guessed_wrong_is_named_where_it_shows(self, tmp_path: Path) -> None:
        body = "".join(f"1,2023-11-14T22:13:20Z,{n}\n" for n in range(60_000))
        path = put(
            tmp_path, "a.csv", f"user_id,event_time,price\n{body}1,2023-11-14T22:13:20Z,0.5\n"
        )
        error = refused(path, "csv")
        assert (error.line, error.value) == (60_002, "0.5")
        source = open_source(path, "csv", types={"price": pa.float64()})
        assert read(source)["price"].to_pylist()[-1] == 0.5

    def test_files_of_one_source_must_agree(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"user_id": [1], "event_time": UTC[:1]}), tmp_path / "a.parquet")
        pq.write_table(pa.table({"user_id": ["1"], "event_time": UTC[:1]}), tmp_path / "b.parquet")
        error = refused(tmp_path, "parquet")
        assert error.file.endswith("b.parquet")
        assert "user_id string" in str(error)

    def test_a_broken_parquet_file_is_refused(self, tmp_path: Path) -> None:
        whole = parquet(tmp_path, user_id=pa.array([1, 2]), event_time=UTC).read_bytes()
        path = put(tmp_path, "cut.parquet", whole[:-20])
        assert "not a whole Parquet file" in str(refused(path, "parquet"))
        assert "not a whole Parquet file" in str(refused(put(tmp_path, "b", "text"), "parquet"))

    def test_a_header_alone_is_refused(self, tmp_path: Path) -> None:
        path = put(tmp_path, "a.csv", "user_id,event_time\n")
        assert "a header but no rows" in str(refused(path, "csv"))

    def test_quoted_fields_and_other_delimiters_are_read(self, tmp_path: Path) -> None:
        text = 'user_id;event_time;name\n"1";2023-11-14T22:13:20Z;"a;b"\n'
        table = read(open_source(put(tmp_path, "a.csv", text), "csv", delimiter=";"))
        assert table["name"].to_pylist() == ["a;b"]


def test_options_of_tables_are_refused_elsewhere(tmp_path: Path) -> None:
    path = put(tmp_path, "u.data", udata(RATINGS))
    with pytest.raises(SchemaError, match="time_unit has no meaning for format 'movielens'"):
        open_source(path, "movielens", time_unit="s")
    with pytest.raises(SchemaError, match="format='netflix' is unknown"):
        open_source(path, "netflix")  # type: ignore[arg-type]
    with pytest.raises(SchemaError, match="on_cut_line='keep' is unknown"):
        open_source(path, "movielens", on_cut_line="keep")  # type: ignore[arg-type]


@pytest.mark.realdata
class TestRealData:
    def test_movielens(self, real_data: Path) -> None:
        table = read(open_source(real_data / "ml-100k", "movielens"))
        assert table.num_rows == 100_000
        assert len(table["user_id"].unique()) == 943
        assert len(table["item_id"].unique()) == 1_682
        assert len(table["event_id"].unique()) == 100_000
        assert str(pc.min(table["event_time"]).as_py()) == "1997-09-20 03:05:10+00:00"
        assert str(pc.max(table["event_time"]).as_py()) == "1998-04-22 23:10:38+00:00"

    def test_globo(self, real_data: Path) -> None:
        source = open_source(real_data / "globo-news" / "clicks", "globo")
        table = read(source)
        assert len(source.paths) == 385
        assert table.num_rows == 2_988_181
        assert len(table["user_id"].unique()) == 322_897
        assert len(table["item_id"].unique()) == 46_033
        assert len(table["session_id"].unique()) == 1_048_594
        assert len(table["event_id"].unique()) == 2_988_181
        assert str(pc.max(table["event_time"]).as_py()) == "2017-11-13 20:04:14.886000+00:00"

    def test_taobao_ends_in_mid_line(self, real_data: Path) -> None:
        folder = real_data / "taobao-userbehavior-sample"
        error = refused(folder, "taobao")
        assert (error.line, error.value) == (96_169, "301780,543546,4181361,pv,15")
        source = open_source(folder, "taobao", on_cut_line="drop")
        table = read(source)
        assert (table.num_rows, source.num_dropped) == (96_168, 1)
        assert len(table["user_id"].unique()) == 58_732
        counts = {v["values"]: v["counts"] for v in table["action"].value_counts().to_pylist()}
        assert counts == {0: 85_773, 1: 2_959, 2: 5_292, 3: 2_144}
