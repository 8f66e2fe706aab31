"""A unit packed into bytes and unpacked is the same unit, in the same place."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit_sources import assert_same

from vlm_dagster.loaders.materialize import Arena, UnitData
from vlm_dagster.loaders.packing import PackedUnit, unpack

VALUES = {
    pa.bool_(): st.booleans(),
    pa.int8(): st.integers(-128, 127),
    pa.int32(): st.integers(-(2**31), 2**31 - 1),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.float32(): st.floats(width=32, allow_nan=False),
    pa.float64(): st.floats(allow_nan=False),
    pa.string(): st.text(max_size=9),
    pa.timestamp("us", "UTC"): st.integers(0, 2**52),
}
# What Arrow's streams, and a group, might call something themselves.
NAMES = ["starts 0", "lengths 0", "user_id", "request_time", "vlm.group", "ü"]


@st.composite
def arrays(draw: st.DrawFn, length: int) -> pa.Array:
    """Of any type; often a slice of a longer one, as filtering and gathering leave it."""
    kind = draw(st.sampled_from(list(VALUES)))
    before, after = draw(st.integers(0, 9)), draw(st.integers(0, 3))
    size = before + length + after
    values = draw(st.lists(VALUES[kind], min_size=size, max_size=size))
    return pa.array(values, kind).slice(before, length)


@st.composite
def units(draw: st.DrawFn) -> UnitData:
    num_examples = draw(st.integers(0, 12))
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=3))
    examples = {name: draw(arrays(num_examples)) for name in names}
    arenas = {}
    for group in draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=3)):
        num_events = draw(st.integers(0, 70))
        traits = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=3))
        places = st.lists(st.integers(0, 70), min_size=num_examples, max_size=num_examples)
        arenas[group] = Arena(
            {name: draw(arrays(num_events)) for name in traits},
            np.array(draw(places), np.int64),
            np.array(draw(places), np.int64),
        )
    return UnitData(examples, arenas)


def packed(unit: UnitData, spare: int = 0) -> np.ndarray:
    whole = PackedUnit(unit)
    assert whole.num_bytes % 8 == 0
    memory = np.full(whole.num_bytes + spare, 0xAA, np.uint8)
    whole.write(memory)
    assert (memory[whole.num_bytes :] == 0xAA).all()
    return memory


@given(units())
def test_a_unit_comes_back_as_it_was(unit: UnitData) -> None:
    assert_same(unpack(pa.py_buffer(packed(unit, spare=100))), unit)


@given(units())
def test_the_same_unit_gives_the_same_bytes(unit: UnitData) -> None:
    assert packed(unit).tobytes() == packed(unpack(pa.py_buffer(packed(unit)))).tobytes()


def test_nothing_is_copied_when_it_comes_back() -> None:
    events = {"item": pa.array(range(1000), pa.int64()), "liked": pa.array([True, False] * 500)}
    places = np.arange(10)
    unit = UnitData({"label": pa.array(range(10))}, {"views": Arena(events, places, places)})
    memory = packed(unit)
    found = unpack(pa.py_buffer(memory))
    begin, end = memory.ctypes.data, memory.ctypes.data + len(memory)
    arena = found.arenas["views"]
    for column in (found.examples["label"], *arena.columns.values()):
        assert begin <= column.buffers()[1].address < end
    assert begin <= arena.starts.ctypes.data < arena.lengths.ctypes.data < end
    assert not arena.starts.flags.writeable


def test_other_bytes_are_refused() -> None:
    for content in (b"", b"nonsense" * 20, bytes(64)):
        with pytest.raises((pa.ArrowInvalid, ValueError)):
            unpack(pa.py_buffer(content))
