"""JaggedSequence and Batch: one set of values, three forms, and what can be made of each."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vlm_dagster import Batch, JaggedSequence
from vlm_dagster.errors import SchemaError

# Two users. The first has events 10, 11, 12, 13 and two examples, which see [10, 11, 12] and
# [11, 12, 13]; the second has 20, 21 and two examples of the same request, which see both.
EXPANDED = JaggedSequence.expanded(
    {"item": torch.tensor([10, 11, 12, 11, 12, 13, 20, 21, 20, 21])},
    torch.tensor([0, 3, 6, 8, 10]),
)
DEDUPLICATED = JaggedSequence.deduplicated(
    {"item": torch.tensor([10, 11, 12, 11, 12, 13, 20, 21])},
    torch.tensor([0, 3, 6, 8]),
    torch.tensor([0, 1, 2, 2]),
)
VIEWS = JaggedSequence.views(
    {"item": torch.tensor([10, 11, 12, 13, 20, 21])},
    torch.tensor([0, 1, 4, 4]),
    torch.tensor([3, 3, 2, 2]),
)
SEEN = [[10, 11, 12], [11, 12, 13], [20, 21], [20, 21]]

forms = pytest.mark.parametrize(
    "sequence", [EXPANDED, DEDUPLICATED, VIEWS], ids=lambda sequence: sequence.form
)


def seen(sequence: JaggedSequence, trait: str = "item") -> list[list[Any]]:
    """What each example sees, by the definition of starts and lengths."""
    values = sequence.values[trait].tolist()
    ranges = zip(sequence.starts.tolist(), sequence.lengths.tolist(), strict=True)
    return [values[start : start + length] for start, length in ranges]


# -- the three forms, by example ------------------------------------------------------------------


@forms
def test_starts_and_lengths_mean_the_same_in_every_form(sequence: JaggedSequence) -> None:
    assert seen(sequence) == SEEN
    assert sequence.batch_size == 4
    assert sequence.num_events == 10
    assert sequence.longest == 3


def test_the_forms_differ_in_what_they_hold() -> None:
    assert [s.num_values for s in (EXPANDED, DEDUPLICATED, VIEWS)] == [10, 8, 6]
    assert [s.dedupe_factor for s in (EXPANDED, DEDUPLICATED, VIEWS)] == [1.0, 10 / 8, 10 / 6]
    # int64 values, then offsets; offsets and inverse; starts and lengths.
    assert [s.num_bytes for s in (EXPANDED, DEDUPLICATED, VIEWS)] == [
        8 * (10 + 5), 8 * (8 + 4 + 4), 8 * (6 + 4 + 4),
    ]  # fmt: skip


@forms
def test_every_form_expands_to_the_same(sequence: JaggedSequence) -> None:
    expanded = sequence.expand()
    assert expanded.form == "expanded"
    assert torch.equal(expanded.values["item"], EXPANDED.values["item"])
    assert torch.equal(expanded.offsets, EXPANDED.offsets)
    assert expanded.expand() is expanded
    assert sequence.expand([]).values == {}
    assert sequence.expand([]).num_events == 10


def test_a_deduplicated_sequence_has_its_distinct_ones_and_whose_they_are() -> None:
    assert seen(DEDUPLICATED.unique) == [[10, 11, 12], [11, 12, 13], [20, 21]]
    assert DEDUPLICATED.unique.form == "expanded"
    assert DEDUPLICATED.inverse.tolist() == [0, 1, 2, 2]


def test_what_a_form_does_not_have_it_refuses_with_the_way_out() -> None:
    for sequence in (VIEWS, DEDUPLICATED):
        with pytest.raises(SchemaError, match=r"has no offsets.*expand\(\)"):
            _ = sequence.offsets
    for sequence in (VIEWS, EXPANDED):
        with pytest.raises(SchemaError, match=r"has no inverse.*form='deduplicated'"):
            _ = sequence.inverse
        with pytest.raises(SchemaError, match="has no inverse"):
            _ = sequence.unique
    for ask in (VIEWS.to_padded, VIEWS.to_nested, lambda name: VIEWS.expand([name])):
        with pytest.raises(SchemaError, match=r"no trait 'price'.*There are item"):
            ask("price")
    with pytest.raises(SchemaError, match="differ in length"):
        JaggedSequence.expanded({"a": torch.zeros(1), "b": torch.zeros(2)}, torch.tensor([0, 1]))
    with pytest.raises(SchemaError, match="2 starts, but 1 lengths"):
        JaggedSequence.views({}, torch.tensor([0, 0]), torch.tensor([0]))


# -- other shapes ---------------------------------------------------------------------------------


@forms
def test_padding_keeps_the_newest_events(sequence: JaggedSequence) -> None:
    assert sequence.to_padded("item").tolist() == [
        [10, 11, 12], [11, 12, 13], [20, 21, 0], [20, 21, 0],
    ]  # fmt: skip
    assert sequence.to_padded("item", side="left", value=-1).tolist() == [
        [10, 11, 12], [11, 12, 13], [-1, 20, 21], [-1, 20, 21],
    ]  # fmt: skip
    for side in ("left", "right"):
        assert sequence.to_padded("item", 2, side=side).tolist() == [
            [11, 12], [12, 13], [20, 21], [20, 21],
        ]  # fmt: skip
        assert sequence.to_padded("item", 0, side=side).shape == (4, 0)
    with pytest.raises(SchemaError, match="side='middle'"):
        sequence.to_padded("item", 2, side="middle")  # type: ignore[arg-type]


@forms
def test_a_nested_tensor_has_the_jagged_layout(sequence: JaggedSequence) -> None:
    nested = sequence.to_nested("item")
    assert nested.layout == torch.jagged
    assert [row.tolist() for row in nested.unbind()] == SEEN


@forms
def test_moving_keeps_the_form(sequence: JaggedSequence) -> None:
    for moved in (sequence.to("cpu"), sequence.pin_memory()):
        assert moved.form == sequence.form
        assert moved.num_events == sequence.num_events
        assert seen(moved) == SEEN
    on_meta = sequence.to("meta")  # a device that, like a GPU, cannot answer without waiting
    assert {t.device.type for t in (*on_meta.values.values(), on_meta.starts)} == {"meta"}
    assert on_meta.num_bytes == sequence.num_bytes


@forms
def test_nothing_asks_the_device_for_sizes(sequence: JaggedSequence) -> None:
    """Asking a GPU makes the host wait for it; a meta tensor cannot be asked at all."""
    there = sequence.to("meta")
    assert there.expand().values["item"].shape == (10,)
    assert there.to_padded("item", 2).shape == (4, 2)
    assert there.to_padded("item", 2, side="left").shape == (4, 2)
    with pytest.raises(RuntimeError):
        _ = there.longest  # was not given


@forms
def test_it_compiles_whole(sequence: JaggedSequence) -> None:
    def model(sequence: JaggedSequence) -> tuple[Tensor, Tensor]:
        return sequence.expand().values["item"], sequence.to_padded("item", 2)

    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for found, wanted in zip(compiled(sequence), model(sequence), strict=True):
        assert torch.equal(found, wanted)


@st.composite
def sequences(draw: st.DrawFn, num_examples: int | None = None) -> JaggedSequence:
    """Of any form: with any overlaps, gaps and empty sequences; four traits of different types."""
    form = draw(st.sampled_from(["expanded", "deduplicated", "views"]))
    size = draw(st.integers(0, 5)) if num_examples is None else num_examples
    if form == "views":
        size_of_values = draw(st.integers(0, 8))
        starts = draw(st.lists(st.integers(0, size_of_values), min_size=size, max_size=size))
        lengths = [draw(st.integers(0, size_of_values - start)) for start in starts]
        make = JaggedSequence.views
        layout = [starts, lengths]
    else:
        num_sequences = draw(st.integers(1, 3)) if form == "deduplicated" and size else size
        counts = draw(st.lists(st.integers(0, 4), min_size=num_sequences, max_size=num_sequences))
        offsets = [sum(counts[:i]) for i in range(num_sequences + 1)]
        size_of_values = offsets[-1]
        make, layout = JaggedSequence.expanded, [offsets]
        if form == "deduplicated":
            of = st.integers(0, max(num_sequences - 1, 0))
            inverse = draw(st.lists(of, min_size=size, max_size=size))
            make, layout = JaggedSequence.deduplicated, [offsets, inverse]
    times = draw(st.lists(st.integers(0, 4), min_size=size_of_values, max_size=size_of_values))
    values = {
        "item": torch.arange(size_of_values),
        "time": torch.tensor(times, dtype=torch.int64),
        "liked": torch.arange(size_of_values) % 3 == 0,
        "kind": torch.arange(size_of_values).to(torch.int8),
        "price": torch.arange(size_of_values) / 4,
    }
    return make(values, *(torch.tensor(part, dtype=torch.int64) for part in layout))


@given(sequences(), st.integers(0, 6) | st.none(), st.sampled_from(["left", "right"]))
def test_any_sequence_expands_pads_and_nests_like_lists(
    sequence: JaggedSequence, width: int | None, side: Any
) -> None:
    for trait, dtype in [
        ("item", torch.int64), ("liked", torch.bool), ("kind", torch.int8), ("price", torch.float32),
    ]:  # fmt: skip
        wanted = seen(sequence, trait)
        expanded = sequence.expand()
        assert seen(expanded, trait) == wanted
        assert expanded.values[trait].tolist() == [value for row in wanted for value in row]
        size = max(map(len, wanted), default=0) if width is None else width
        assert sequence.longest == max(map(len, wanted), default=0)
        rows = [row[max(len(row) - size, 0) :] for row in wanted]
        pads = [[1] * (size - len(row)) for row in rows]
        padded = sequence.to_padded(trait, width, value=1, side=side)
        assert padded.dtype == dtype
        assert padded.shape == (len(rows), size)
        assert padded.tolist() == [
            row + pad if side == "right" else pad + row for row, pad in zip(rows, pads, strict=True)
        ]
        assert [row.tolist() for row in sequence.to_nested(trait).unbind()] == wanted


# -- a batch --------------------------------------------------------------------------------------


def test_a_batch_moves_and_expands_all_its_groups() -> None:
    batch = Batch(
        {"request_time": torch.arange(4)},
        {"ratings": VIEWS, "visits": DEDUPLICATED},
        {"name": ["a", "b", "c", ""]},
        num_padding=1,
    )
    assert batch.num_bytes == 8 * 4 + VIEWS.num_bytes + DEDUPLICATED.num_bytes
    assert batch.dedupe_factor == (10 + 10) / (6 + 8)
    for same in (batch.to("cpu"), batch.pin_memory(), batch.expand()):
        assert same.batch_size == 4
        assert same.num_padding == 1
        assert same.strings == batch.strings
        assert all(seen(sequence) == SEEN for sequence in same.sequences.values())
    assert {s.form for s in batch.expand().sequences.values()} == {"expanded"}
    assert Batch({"request_time": torch.arange(0)}, {}).dedupe_factor == 1.0


# -- several groups as one ------------------------------------------------------------------------


def groups(**sequences: JaggedSequence) -> Batch:
    size = next(iter(sequences.values())).batch_size
    return Batch({"request_time": torch.arange(size)}, sequences)


def one(**traits: list[Any]) -> JaggedSequence:
    """One example's sequence."""
    size = len(next(iter(traits.values())))
    return JaggedSequence.expanded(
        {name: torch.tensor(values) for name, values in traits.items()}, torch.tensor([0, size])
    )


def test_groups_interleave_by_time_and_ties_go_by_the_order_of_the_groups() -> None:
    batch = groups(
        clicks=one(at=[1, 3, 3], item=[10, 11, 12], seconds=[7, 8, 9]),
        orders=one(at=[2, 3, 4], item=[20, 21, 22]),
    )
    merged = batch.merged(by="at", traits=["item", "seconds"], fill={"seconds": -1})
    assert merged.offsets.tolist() == [0, 6]
    assert merged.values["at"].tolist() == [1, 2, 3, 3, 3, 4]
    assert merged.values["item"].tolist() == [10, 20, 11, 12, 21, 22]
    assert merged.values["seconds"].tolist() == [7, -1, 8, 9, -1, -1]
    assert merged.values["group"].tolist() == [0, 1, 0, 0, 1, 1]
    assert merged.values["group"].dtype == torch.int8

    newest = batch.merged(["orders", "clicks"], by="at", max_length=4, group_column="of")
    assert list(newest.values) == ["at", "item", "of"]  # the traits that all groups have
    assert newest.values["item"].tolist() == [21, 11, 12, 22]
    assert newest.values["of"].tolist() == [0, 1, 1, 0]
    assert newest.longest == 4


def test_a_merge_says_what_is_missing() -> None:
    batch = groups(clicks=one(at=[1], item=[1], x=[1]), orders=one(at=[1], x=[1.0]))
    for told, options in [
        ("group 'orders' has no 'item' to merge by", {"by": "item"}),
        ("group 'orders' has no trait 'item'. Say what.*fill=", {"by": "at", "traits": ["item"]}),
        ("no group has a trait 'y'", {"by": "at", "traits": ["y"], "fill": {"y": 0}}),
        ("trait 'x' has different types", {"by": "at"}),
        ("a trait is called 'at'", {"by": "at", "traits": [], "group_column": "at"}),
        ("group 'views' is not in this batch", {"by": "at", "groups": ["views"]}),
        ("group 'clicks' is named twice", {"by": "at", "groups": ["clicks", "clicks"]}),
        ("a merge of no groups", {"by": "at", "groups": []}),
    ]:
        with pytest.raises(SchemaError, match=told):
            batch.merged(**options)  # type: ignore[arg-type]


@given(st.data(), st.integers(0, 4), st.integers(0, 12) | st.none())
def test_any_groups_merge_like_sorted_lists(
    data: st.DataObject, num_examples: int, max_length: int | None
) -> None:
    parts = [data.draw(sequences(num_examples)) for _ in range(data.draw(st.integers(1, 3)))]
    for sequence in parts[1:]:
        del sequence.values["price"]
    batch = groups(**{f"g{number}": sequence for number, sequence in enumerate(parts)})
    merged = batch.merged(by="time", fill={"price": 0.5}, max_length=max_length)
    for example in range(num_examples):
        rows = [
            (time, number, place, seen(part, "item")[example][place])
            for number, part in enumerate(parts)
            for place, time in enumerate(seen(part, "time")[example])
        ]
        rows.sort(key=lambda row: row[:3])
        rows = rows if max_length is None else rows[max(len(rows) - max_length, 0) :]
        assert seen(merged, "time")[example] == [time for time, *_ in rows]
        assert seen(merged, "group")[example] == [number for _, number, *_ in rows]
        assert seen(merged, "item")[example] == [item for *_, item in rows]
        prices = [item / 4 if number == 0 else 0.5 for _, number, _, item in rows]
        assert seen(merged, "price")[example] == prices
    assert merged.num_events == int(merged.lengths.sum())
    assert merged.longest == max(merged.lengths.tolist(), default=0)


# -- TorchRec -------------------------------------------------------------------------------------


def kjt_of(sequence: JaggedSequence) -> Callable[..., Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # importing it warns of optional parts of its own
            import torchrec  # noqa: F401
    except (ImportError, OSError) as error:
        pytest.skip(f"torchrec, an optional extra, cannot be imported: {error}")
    return sequence.to_kjt


def with_kinds(sequence: JaggedSequence) -> JaggedSequence:
    item = sequence.values["item"]
    values = {"item": item, "kind": (item % 7).to(torch.int8), "price": item / 4}
    layout = sequence._layout
    return getattr(JaggedSequence, sequence.form)(values, *layout)


def rows_of(kjt: Any, key: str) -> list[list[Any]]:
    return [row.tolist() for row in kjt[key].to_dense()]


@forms
def test_a_keyed_jagged_tensor_has_a_key_a_trait(sequence: JaggedSequence) -> None:
    kjt = kjt_of(with_kinds(sequence))(["kind", "item"])
    assert kjt.keys() == ["kind", "item"]
    assert kjt.stride() == 4
    assert kjt.values().dtype == torch.int64  # the widest
    assert rows_of(kjt, "item") == SEEN
    assert rows_of(kjt, "kind") == [[value % 7 for value in row] for row in SEEN]
    kjt = with_kinds(sequence).to_kjt(["price"])
    assert kjt.values().dtype == torch.float32
    assert rows_of(kjt, "price") == [[value / 4 for value in row] for row in SEEN]


def test_whole_numbers_and_floats_are_two_keyed_jagged_tensors() -> None:
    to_kjt = kjt_of(with_kinds(VIEWS))
    with pytest.raises(SchemaError, match=r"item torch.int64.*price torch.float32.*Make two"):
        to_kjt()
    with pytest.raises(SchemaError, match="no traits"):
        to_kjt([])


def test_an_embedding_bag_pools_each_distinct_sequence_once() -> None:
    to_kjt = kjt_of(with_kinds(DEDUPLICATED))
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

    unique = to_kjt(["item", "kind"], unique=True)
    assert rows_of(unique, "item") == [[10, 11, 12], [11, 12, 13], [20, 21]]
    assert unique.inverse_indices()[1].tolist() == [[0, 1, 2, 2]] * 2
    tables = [
        EmbeddingBagConfig(name=name, embedding_dim=4, num_embeddings=30, feature_names=[name])
        for name in ("item", "kind")
    ]
    pool = EmbeddingBagCollection(tables=tables)
    pooled, wanted = pool(unique), pool(to_kjt(["item", "kind"]))
    for name in ("item", "kind"):
        assert pooled[name].shape == (4, 4)
        assert torch.equal(pooled[name], wanted[name])
    with pytest.raises(SchemaError, match="has no inverse"):
        VIEWS.to_kjt(unique=True)


def test_without_torchrec_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchrec", None)
    with pytest.raises(SchemaError, match=r"pip install .*torchrec==1\.8\.0"):
        VIEWS.to_kjt()


def test_a_trait_that_is_named_twice_is_no_key() -> None:
    with pytest.raises(SchemaError, match="trait 'item' is named twice"):
        VIEWS.to_kjt(["item", "item"])


# -- values and lengths that cannot be ------------------------------------------------------------


def of_kind(kind: torch.dtype) -> JaggedSequence:
    values = {"a": torch.ones(2, dtype=kind), "at": torch.tensor([1, 2])}
    return JaggedSequence.expanded(values, torch.tensor([0, 2]))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (torch.int64, 1.5),
        (torch.int64, 2.0**63),
        (torch.int8, 300),
        (torch.int32, float("nan")),
        (torch.int32, float("inf")),
        (torch.bool, 2),
        (torch.bool, 0.5),
        (torch.float32, 1e39),
        (torch.float64, 10**400),
    ],
)
def test_a_fill_that_the_type_cannot_hold_is_refused(kind: torch.dtype, value: float) -> None:
    sequence = of_kind(kind)
    told = f"{value} for trait 'a', which is {kind}. Use a".replace("+", r"\+")
    with pytest.raises(SchemaError, match=told):
        sequence.to_padded("a", 3, value=value)
    batch = groups(has=sequence, lacks=one(at=[1, 2]))
    with pytest.raises(SchemaError, match=told):
        batch.merged(by="at", fill={"a": value})


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (torch.int64, -1.0),
        (torch.int8, -128),
        (torch.bool, True),
        (torch.bool, 0),
        (torch.float32, 0.1),
        (torch.float16, float("-inf")),
        (torch.bfloat16, 3e38),
    ],
)
def test_a_fill_that_the_type_holds_is_there(kind: torch.dtype, value: float) -> None:
    wanted = torch.tensor(value, dtype=kind)
    assert of_kind(kind).to_padded("a", 3, value=value)[0, 2] == wanted
    merged = groups(has=of_kind(kind), lacks=one(at=[3])).merged(by="at", fill={"a": value})
    assert merged.values["a"][-1] == wanted


def test_a_negative_length_is_refused() -> None:
    with pytest.raises(SchemaError, match="max_length=-1"):
        of_kind(torch.int64).to_padded("a", -1)
    with pytest.raises(SchemaError, match="max_length=-1"):
        groups(has=of_kind(torch.int64)).merged(by="at", max_length=-1)
