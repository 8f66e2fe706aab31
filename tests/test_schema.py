"""Declarations validate themselves, and survive being stored."""

from __future__ import annotations

import json
import math
import pickle
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_dagster import FeatureGroup, PointerSpec, Projection, Trait
from vlm_dagster.errors import SchemaError
from vlm_dagster.schema import RESERVED, check_name

TIME = pa.timestamp("us", "UTC")
TYPES = [
    pa.bool_(), pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.float32(), pa.float64(),
    pa.string(), TIME,
]  # fmt: skip


@pytest.mark.parametrize("name", ["a", "item_id", "x" * 63, "a1_"])
def test_plain_names_are_accepted(name: str) -> None:
    assert check_name(name, "trait name") == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "A",
        "1a",
        "_a",
        "a-b",
        "a b",
        "a.b",
        "a/b",
        "..",
        'a"b',
        "a;drop",
        "ä",
        "x" * 64,
        "a\n",
        7,
        None,
    ],
)
def test_names_that_could_break_a_path_or_sql_are_refused(name: object) -> None:
    for declare in (
        lambda: Trait(name, pa.int64()),  # type: ignore[arg-type]
        lambda: FeatureGroup(name),  # type: ignore[arg-type]
        lambda: PointerSpec(name, ["ratings"]),  # type: ignore[arg-type]
        lambda: PointerSpec("pointers", [name]),  # type: ignore[list-item]
    ):
        with pytest.raises(SchemaError, match="lower-case letter"):
            declare()


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_names_that_every_event_has_are_reserved(name: str) -> None:
    with pytest.raises(SchemaError, match="reserved"):
        Trait(name, pa.int64())


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_every_type_of_trait_is_stored_and_revived(kind: pa.DataType) -> None:
    trait = Trait("x", kind)
    assert Trait.from_json(json.loads(json.dumps(trait.to_json()))) == trait


@pytest.mark.parametrize(
    "kind",
    [pa.uint64(), pa.float16(), pa.timestamp("ns", "UTC"), pa.timestamp("us"), pa.date32(),
     pa.list_(pa.int64()), pa.decimal128(10), pa.binary(), pa.large_string(), pa.null()],
    ids=str,
)  # fmt: skip
def test_types_that_cannot_be_stored_are_refused(kind: pa.DataType) -> None:
    with pytest.raises(SchemaError, match=r"cannot be stored.*int64"):
        Trait("x", kind)


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        (pa.bool_(), False), (pa.int8(), -1), (pa.int64(), 2**63 - 1), (pa.float32(), 0.5),
        (pa.float64(), math.inf), (pa.float64(), 1), (pa.string(), ""), (TIME, 0),
    ],
)  # fmt: skip
def test_a_default_of_the_traits_own_type_is_stored(kind: pa.DataType, missing: object) -> None:
    trait = Trait("x", kind, missing=missing)  # type: ignore[arg-type]
    assert Trait.from_json(json.loads(json.dumps(trait.to_json()))) == trait


def test_a_default_of_not_a_number_is_stored() -> None:
    trait = Trait("x", pa.float32(), missing=math.nan)
    revived = Trait.from_json(json.loads(json.dumps(trait.to_json(), allow_nan=False)))
    assert isinstance(revived.missing, float)
    assert math.isnan(revived.missing)


@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        (pa.int64(), 1.5), (pa.int64(), 1.0), (pa.int64(), "1"), (pa.int64(), True), (pa.int8(), 128),
        (pa.int64(), 2**70), (pa.bool_(), 1), (pa.string(), 1), (pa.float32(), "nan"),
        (pa.float32(), np.float32(1)), (TIME, datetime(2020, 1, 1, tzinfo=UTC)), (TIME, "2020-01-01"),
        (pa.string(), b"x"), (pa.int64(), []),
    ],
)  # fmt: skip
def test_a_default_of_another_type_is_refused(kind: pa.DataType, missing: object) -> None:
    with pytest.raises(SchemaError, match="missing=") as caught:
        Trait("x", kind, missing=missing)  # type: ignore[arg-type]
    assert repr(missing) in str(caught.value)


@given(
    st.sampled_from([pa.int64(), pa.string()]),
    st.sampled_from([pa.int64(), pa.string()]),
    st.sampled_from(["recorded", "event_time"]),
    st.sampled_from(["refuse", "first"]),
    st.lists(st.sampled_from(TYPES), max_size=4),
)
def test_a_feature_group_survives_being_stored(
    user_id, event_id, availability, duplicates, types
) -> None:
    group = FeatureGroup(
        "clicks",
        [Trait(f"t{i}", kind) for i, kind in enumerate(types)],
        user_id=user_id,
        event_id=event_id,
        availability=availability,
        duplicates=duplicates,
    )
    assert FeatureGroup.from_json(json.loads(json.dumps(group.to_json()))) == group
    assert pickle.loads(pickle.dumps(group)) == group
    assert hash(group) == hash(FeatureGroup.from_json(group.to_json()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"traits": [Trait("a", pa.int8()), Trait("a", pa.int64())]}, "twice"),
        ({"user_id": pa.int32()}, "int64 or string"),
        ({"event_id": pa.float64()}, "int64 or string"),
        ({"availability": "sometimes"}, "recorded"),
        ({"duplicates": "last"}, "first"),
    ],
)
def test_a_feature_group_that_cannot_be_is_refused(options: dict, words: str) -> None:
    with pytest.raises(SchemaError, match=words):
        FeatureGroup("clicks", **options)


def test_events_are_stored_without_nulls() -> None:
    schema = FeatureGroup("clicks", [Trait("a", pa.int8())]).event_schema
    assert schema.names == ["user_id", "event_id", "event_time", "available_at", "a"]
    assert not any(field.nullable for field in schema)


# -- projections ----------------------------------------------------------------------------------

GROUP = FeatureGroup("clicks", [Trait("a", pa.int8()), Trait("b", pa.int8())])


def test_a_projection_reads_all_traits_by_default_and_named_ones_in_order() -> None:
    assert Projection().columns(GROUP) == ["a", "b"]
    assert Projection(["b", "event_time", "event_id"]).columns(GROUP) == [
        "b",
        "event_time",
        "event_id",
    ]
    assert Projection([]).columns(GROUP) == []


def test_a_projection_names_what_the_group_has() -> None:
    with pytest.raises(SchemaError, match=r"'c'.*a, b"):
        Projection(["c"]).columns(GROUP)
    with pytest.raises(SchemaError, match="user_id"):
        Projection(["user_id"]).columns(GROUP)


@pytest.mark.parametrize("length", [-1, 1.5, True, "5"])
def test_a_projections_length_is_a_number_of_events(length: object) -> None:
    with pytest.raises(SchemaError, match="max_length"):
        Projection(max_length=length)  # type: ignore[arg-type]


def test_a_projection_of_one_string_or_of_a_trait_twice_is_refused() -> None:
    with pytest.raises(SchemaError, match=r"traits=\['a'\]"):
        Projection("a")
    with pytest.raises(SchemaError, match="twice"):
        Projection(["a", "a"])


def test_projections_are_values() -> None:
    assert {Projection(["a"], 5): 1}[Projection(("a",), 5)] == 1
    assert json.dumps(Projection(["a"], 5).to_json())


# -- pointer datasets -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"groups": []}, "no feature groups"),
        ({"groups": "ratings"}, "one string"),
        ({"groups": ["a", "a"]}, "once"),
        ({"groups": ["a"], "request": "now"}, "event_id"),
        ({"groups": ["a"], "target_group": "b"}, "target_group"),
        ({"groups": ["a"], "max_length": 0}, "1 or more"),
        ({"groups": ["a"], "max_length": True}, "1 or more"),
        ({"groups": ["a"], "duplicates": "all"}, "refuse"),
        ({"groups": ["a"], "columns": [Trait("request_id", pa.int8())]}, "taken"),
        ({"groups": ["a"], "columns": [Trait("a_length", pa.int8())]}, "taken"),
        ({"groups": ["a"], "columns": [Trait("x", pa.int8()), Trait("x", pa.int8())]}, "taken"),
    ],
)
def test_a_pointer_dataset_that_cannot_be_is_refused(options: dict, words: str) -> None:
    with pytest.raises(SchemaError, match=words):
        PointerSpec("pointers", **options)


def test_groups_whose_columns_would_collide_are_refused() -> None:
    # `a` with a column `b_length` of its own would meet group `a_b`.
    with pytest.raises(SchemaError, match="taken"):
        PointerSpec("pointers", ["a", "a_b"], [Trait("a_b_length", pa.int8())])


@given(
    st.sampled_from(["event_id", "request_time"]),
    st.sampled_from([None, 1, 4096]),
    st.sampled_from([pa.int64(), pa.string()]),
    st.sampled_from(["refuse", "first"]),
)
def test_a_pointer_declaration_survives_being_stored(request, max_length, kind, duplicates) -> None:
    spec = PointerSpec(
        "pointers",
        ["ratings", "clicks"],
        [Trait("label", pa.float32())],
        request=request,
        target_group="clicks",
        max_length=max_length,
        user_id=kind,
        request_id=kind,
        duplicates=duplicates,
    )
    assert PointerSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


@pytest.mark.parametrize("option", ["user_id", "request_id"])
def test_ids_of_requests_are_integers_or_strings(option: str) -> None:
    with pytest.raises(SchemaError, match="int64 or string"):
        PointerSpec("pointers", ["ratings"], **{option: pa.float64()})
