"""The hashes of the format. The golden values may never change: stored tables depend on them."""

from __future__ import annotations

import random
import struct
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from strategies import TIME, event_table, group_of, integer_ids, many_events, string_ids

from vlm_dagster.hashing import (
    Digest,
    bucket_of,
    digest_rows,
    event_words,
    id_words,
    mix64,
    run_lengths,
)

INTEGERS = pa.array([0, 1, -1, 42, 2**63 - 1, -(2**63), 2**32, 196])
STRINGS = pa.array(["", "a", "ä", "user-12345678", "12345678", "123456789"])

EVERY_TYPE = pa.table(
    {
        "user_id": pa.array([1, -2, 3]),
        "event_id": pa.array(["a", "", "ü"]),
        "event_time": pa.array([0, 1, 10**15], TIME),
        "b": pa.array([True, False, True]),
        "i8": pa.array([1, -1, 127], pa.int8()),
        "f4": pa.array([0.5, -0.0, float("nan")], pa.float32()),
        "f8": pa.array([0.1, float("inf"), -1.0]),
    }
)


# -- golden ---------------------------------------------------------------------------------------


def test_mix64_is_golden() -> None:
    words = mix64(np.array([0, 1, 2**63, 2**64 - 1, 12345], np.uint64))
    assert [hex(word) for word in words.tolist()] == [
        "0x0",
        "0x5692161d100b05e5",
        "0x25c26ea579cea98a",
        "0xb4d055fcf2cbbd7b",
        "0xf36cf1164265dd51",
    ]


def test_buckets_are_golden() -> None:
    assert bucket_of(INTEGERS, 16).tolist() == [0, 7, 1, 12, 12, 0, 15, 5]
    assert bucket_of(INTEGERS, 65536).tolist() == [
        0, 10423, 16017, 52572, 17420, 26016, 30479, 12341,
    ]  # fmt: skip
    assert bucket_of(STRINGS, 16).tolist() == [10, 0, 9, 10, 5, 5]
    assert bucket_of(STRINGS, 65536).tolist() == [35114, 5472, 5209, 34746, 23605, 56405]


def test_checksum_words_are_golden() -> None:
    assert [hex(w) for w in event_words(INTEGERS, np.arange(8)).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x4968764f9af8b381",
        "0xdc55df523aee1573",
        "0xd00ff2cd1798bc5a",
        "0xe03a6c53a66c1fa0",
        "0x1e06f328010c8fb5",
        "0x892888d11f6290e2",
        "0x352b263b612842a6",
    ]
    assert [hex(w) for w in event_words(STRINGS, np.arange(6) + 100).tolist()] == [
        "0x8176daf800a05f50",
        "0xb5d7e6a21ba9c8f3",
        "0x3d7baedf3cc65691",
        "0x1ebb7b3d4edb684b",
        "0x6bd6f15d3ebe1c5c",
        "0xc9f96ef820a7124d",
    ]


@pytest.mark.parametrize(
    ("columns", "golden"),
    [
        (EVERY_TYPE.column_names, "vlm1-3-e21db9dee686e6f9918930496c4ffcdc"),
        (["user_id"], "vlm1-3-7749e6731b647db21d69e813e667a081"),
        (["event_id"], "vlm1-3-7a94dc9ed4b5d461ae2c944020202ee1"),
        (["event_time"], "vlm1-3-5dc2e8f5af02ff9af95d6da0545d1da3"),
        (["b"], "vlm1-3-e6092dfe3e3e6507fc6de097de334e15"),
        (["i8"], "vlm1-3-3b5c4cbb7981861855c28cb94261449b"),
        (["f4"], "vlm1-3-fe7fe7e3e632f78ab4157d4022301572"),
        (["f8"], "vlm1-3-3682ac95757ba9b011e7fd1404dec57c"),
    ],
)
def test_digests_are_golden(columns: list[str], golden: str) -> None:
    assert str(digest_rows(EVERY_TYPE.select(columns))) == golden


def test_the_empty_digest_is_golden() -> None:
    assert str(digest_rows(EVERY_TYPE.slice(0, 0))) == f"vlm1-0-{'0' * 32}"


# -- against one value at a time ------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1))
def test_mix64_is_the_documented_arithmetic(words: list[int]) -> None:
    assert mix64(np.array(words, np.uint64)).tolist() == [reference.mix64(w) for w in words]


@given(
    st.one_of(st.lists(integer_ids, min_size=1), st.lists(string_ids, min_size=1)),
    st.integers(1, 65536),
)
def test_buckets_are_the_documented_arithmetic(ids: list, num_buckets: int) -> None:
    expected = [reference.bucket(i, num_buckets) for i in ids]
    assert bucket_of(pa.array(ids), num_buckets).tolist() == expected


@given(
    st.one_of(st.lists(integer_ids, min_size=1), st.lists(string_ids, min_size=1)),
    st.integers(0, 2**40),
)
def test_checksum_words_sum_to_the_documented_checksum(ids: list, first: int) -> None:
    words = event_words(pa.array(ids), np.arange(first, first + len(ids)))
    total = int(words.sum(dtype=np.uint64).view(np.int64))
    assert total == reference.checksum(ids, first)


def test_buckets_spread_consecutive_users_evenly() -> None:
    for ids in (pa.array(range(100_000)), pa.array([f"user-{i}" for i in range(100_000)])):
        sizes = np.bincount(bucket_of(ids, 16), minlength=16)
        assert 0.9 * 6250 < sizes.min() <= sizes.max() < 1.1 * 6250


# -- what a digest does not depend on -------------------------------------------------------------


@pytest.fixture(scope="module")
def table() -> pa.Table:
    """More rows than are hashed at once, of every kind of column."""
    events = many_events(seed=5, num_events=20_000, num_users=100)
    return event_table(events, group_of(events))


def test_row_order_does_not_matter(table: pa.Table) -> None:
    order = np.random.default_rng(0).permutation(table.num_rows)
    assert digest_rows(table.take(order)) == digest_rows(table)


def test_column_order_does_not_matter(table: pa.Table) -> None:
    assert digest_rows(table.select(table.column_names[::-1])) == digest_rows(table)


def test_chunks_and_offsets_do_not_matter(table: pa.Table) -> None:
    cuts = [0, 1, 2, 777, 16_384, 16_385, 20_000]
    parts = [table.slice(low, high - low) for low, high in pairwise(cuts)]
    assert digest_rows(pa.concat_tables(parts)) == digest_rows(table)


def test_digests_of_parts_add_up(table: pa.Table) -> None:
    cuts = [0, 0, 5, 9_999, 20_000]
    parts = [table.slice(low, high - low) for low, high in pairwise(cuts)]
    assert Digest.sum(digest_rows(part) for part in parts) == digest_rows(table)
    assert digest_rows(table) + Digest() == digest_rows(table)


@pytest.mark.parametrize("encode", [pc.dictionary_encode, lambda c: c.cast(pa.large_string())])
def test_the_encoding_of_strings_does_not_matter(table: pa.Table, encode) -> None:
    at = table.column_names.index("title")
    encoded = table.set_column(at, "title", encode(table.column("title")))
    assert digest_rows(encoded) == digest_rows(table)
    ids = pa.chunked_array([["a", "b"], ["a"]])
    assert bucket_of(encode(ids), 7).tolist() == bucket_of(ids, 7).tolist()
    assert id_words(encode(ids)).tolist() == id_words(ids).tolist()


def test_an_empty_chunked_column_hashes_to_nothing() -> None:
    assert len(id_words(pa.chunked_array([], pa.string()))) == 0
    assert len(bucket_of(pa.chunked_array([], pa.int64()), 4)) == 0


# -- what it does depend on -----------------------------------------------------------------------


def test_any_single_value_changes_it() -> None:
    whole = digest_rows(EVERY_TYPE)
    seen = {str(whole)}
    for name in EVERY_TYPE.column_names:
        column = EVERY_TYPE.column(name)
        values = column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column
        for row in range(EVERY_TYPE.num_rows):
            changed = values.to_pylist()
            value = changed[row]
            if isinstance(value, bool):
                changed[row] = not value
            elif isinstance(value, str):
                changed[row] = value + "\x00"
            else:
                changed[row] = 3 if value != value else value - 1 if value != float("inf") else 0.0
            array = pa.array(changed, column.type)
            other = EVERY_TYPE.set_column(EVERY_TYPE.column_names.index(name), name, array)
            seen.add(str(digest_rows(other)))
    assert len(seen) == 1 + EVERY_TYPE.num_columns * EVERY_TYPE.num_rows


def test_swapping_two_users_values_changes_it() -> None:
    table = pa.table({"user_id": [1, 2], "item_id": [10, 20]})
    swapped = pa.table({"user_id": [1, 2], "item_id": [20, 10]})
    assert digest_rows(table) != digest_rows(swapped)


def test_swapping_two_columns_changes_it() -> None:
    table = pa.table({"a": [1], "b": [2]})
    assert digest_rows(table) != digest_rows(table.rename_columns(["b", "a"]))


def test_a_repeated_row_changes_it() -> None:
    one = pa.table({"a": [1]})
    assert digest_rows(pa.concat_tables([one, one])) != digest_rows(one)


def test_all_nans_are_one_value_and_zeros_are_two() -> None:
    odd_nan = np.frombuffer(struct.pack("<I", 0x7FC00001), np.float32)
    plain_nan = np.array([np.nan], np.float32)
    assert digest_rows(pa.table({"x": odd_nan})) == digest_rows(pa.table({"x": plain_nan}))
    assert digest_rows(pa.table({"x": [0.0]})) != digest_rows(pa.table({"x": [-0.0]}))


def test_many_close_rows_have_distinct_digests() -> None:
    rng = random.Random(0)
    rows = {(rng.randrange(100), rng.randrange(100), rng.randrange(10)) for _ in range(3_000)}
    digests = {
        str(digest_rows(pa.table({"u": [u], "i": [i], "r": [float(r)]}))) for u, i, r in rows
    }
    assert len(digests) == len(rows)


# -- values ---------------------------------------------------------------------------------------


@given(st.integers(0, 10**12), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_a_digest_reads_back_from_its_text(rows: int, low: int, high: int) -> None:
    digest = Digest(rows, low, high)
    assert Digest.parse(str(digest)) == digest


@pytest.mark.parametrize("text", ["", "vlm1-3-abc", "vlm2-3-" + "0" * 32, "vlm1--1-" + "0" * 32])
def test_what_is_no_digest_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a digest"):
        Digest.parse(text)


@given(st.lists(st.sampled_from(["", "a", "b", "ü"])))
def test_run_lengths_count_sorted_ids(ids: list[str]) -> None:
    distinct, counts = run_lengths(pa.array(sorted(ids), pa.string()))
    assert distinct.to_pylist() == sorted(set(ids))
    assert counts.tolist() == [ids.count(i) for i in sorted(set(ids))]
