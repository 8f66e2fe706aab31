"""Item vocabularies: which items are known, and at which index."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm_dagster.errors import SchemaError
from vlm_dagster.training.vocabulary import Vocabulary, build_vocabulary

IDS = st.integers(-(2**63), 2**63 - 1) | st.integers(0, 9)


def test_items_come_by_falling_frequency_then_rising_id() -> None:
    vocabulary = build_vocabulary([np.array([7, 9, 7, 3]), pa.array([9, 5, 7], pa.int32())])
    assert vocabulary.ids.tolist() == [7, 9, 3, 5]
    assert vocabulary.counts.tolist() == [0, 3, 2, 1, 1]
    assert vocabulary.size == 5
    wanted = torch.tensor([[5, 8], [7, -1]])
    assert vocabulary.lookup(wanted).tolist() == [[4, 0], [1, 0]]


@given(
    chunks=st.lists(st.lists(IDS, max_size=20), max_size=6),
    min_count=st.integers(1, 3),
    max_size=st.none() | st.integers(1, 5),
    asked=st.lists(IDS, max_size=10),
)
def test_a_vocabulary_equals_a_counter(
    chunks: list[list[int]], min_count: int, max_size: int | None, asked: list[int]
) -> None:
    counter = Counter(item for chunk in chunks for item in chunk)
    kept = [
        item
        for item, count in sorted(counter.items(), key=lambda pair: (-pair[1], pair[0]))
        if count >= min_count
    ][:max_size]
    vocabulary = build_vocabulary(
        (np.array(chunk, dtype=np.int64) for chunk in chunks),
        min_count=min_count,
        max_size=max_size,
    )
    assert vocabulary.ids.tolist() == kept
    assert vocabulary.counts[1:].tolist() == [counter[item] for item in kept]
    assert int(vocabulary.counts.sum()) == counter.total()
    asked += list(counter)
    index = {item: place for place, item in enumerate(kept, start=1)}
    got = vocabulary.lookup(torch.tensor(asked, dtype=torch.int64)).tolist()
    assert got == [index.get(item, 0) for item in asked]


def test_memory_follows_distinct_items_however_many_chunks_come() -> None:
    rng = np.random.default_rng(0)
    chunks = [rng.integers(0, 300_000, 200_000) for _ in range(20)]
    vocabulary = build_vocabulary(iter(chunks))
    counts = np.bincount(np.concatenate(chunks))
    assert vocabulary.size - 1 == np.count_nonzero(counts)
    assert np.array_equal(vocabulary.counts[1:].numpy(), counts[vocabulary.ids.numpy()])


def test_narrow_integers_are_looked_up_too() -> None:
    vocabulary = build_vocabulary([np.array([3, 3, 1], dtype=np.int8)])
    assert vocabulary.lookup(torch.tensor([1, 3, 4], dtype=torch.int16)).tolist() == [2, 1, 0]


def test_ids_that_are_not_integers_are_refused() -> None:
    with pytest.raises(SchemaError, match="item ids are double"):
        build_vocabulary([pa.array([1.5])])
    with pytest.raises(SchemaError, match="item ids are float64"):
        build_vocabulary([np.array([1.5])])
    with pytest.raises(SchemaError, match="1 item ids are null"):
        build_vocabulary([pa.array([1, None])])
    with pytest.raises(SchemaError, match=r"item ids are torch\.float32"):
        build_vocabulary([np.array([1])]).lookup(torch.tensor([1.0]))


def test_limits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(SchemaError, match="min_count=0"):
        build_vocabulary([], min_count=0)
    with pytest.raises(SchemaError, match="max_size=0"):
        build_vocabulary([], max_size=0)


def test_tables_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(SchemaError, match="2 ids has 2 counts"):
        Vocabulary(torch.tensor([1, 2]), torch.tensor([0, 1]))
    with pytest.raises(SchemaError, match="holds an id twice"):
        Vocabulary(torch.tensor([1, 1]), torch.tensor([0, 1, 1]))
    with pytest.raises(SchemaError, match="Both are int64"):
        Vocabulary(torch.tensor([1.0]), torch.tensor([0, 1]))
