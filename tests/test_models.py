"""The HSTU model: its layer by the definition, its promises about padding, time and order."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlm_dagster.errors import SchemaError
from vlm_dagster.models import HSTU, CategoricalTrait, HSTUConfig, ModelInputs
from vlm_dagster.models.inputs import pad
from vlm_dagster.models.layers import HSTULayer, time_bucket_bounds
from vlm_dagster.models.losses import (
    full_softmax_loss,
    log_uniform_log_probability,
    sampled_softmax_loss,
)

NUM_ITEMS = 30
CONFIG = HSTUConfig(
    max_length=8,
    dim=12,
    num_layers=2,
    num_heads=3,
    dropout=0.0,
    traits=(CategoricalTrait("action", 4), CategoricalTrait("category", 7, "hash")),
    label_head=True,
)


def make_inputs(lengths: list[int], seed: int = 0) -> ModelInputs:
    g = torch.Generator().manual_seed(seed)

    def integers(high: int, size: int) -> Tensor:
        return torch.randint(0, high, (size,), generator=g)

    total, batch = sum(lengths), len(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    steps = integers(10**11, total)
    times = torch.cat([part.cumsum(0) for part in steps.split(lengths)]) if batch else steps
    last = pad(times, offsets.diff(), max(lengths, default=0) + 1).max(dim=1).values
    return ModelInputs(
        items=integers(NUM_ITEMS, total),
        times_us=times + 10**15,
        offsets=offsets,
        query_time_us=last + 10**15 + integers(10**11, batch),
        traits={"action": integers(6, total) - 1, "category": integers(10**9, total)},
        targets=integers(NUM_ITEMS, batch),
        labels=integers(2, batch).float(),
    )


def make_model(config: HSTUConfig = CONFIG, seed: int = 0) -> HSTU:
    torch.manual_seed(seed)
    model = HSTU(config, NUM_ITEMS).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and small inits would hide mistakes
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model


@torch.no_grad()
def test_a_layer_is_its_definition_written_as_loops() -> None:
    torch.manual_seed(1)
    batch, size, dim, heads, num_rows = 2, 5, 6, 2, 9
    layer = HSTULayer(dim, heads, num_rows, num_time_buckets=4, dropout=0.0).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(batch, size, dim, dtype=torch.float64)
    buckets = torch.randint(0, 5, (batch, size, size))
    visible = torch.ones(size, size, dtype=torch.bool).tril()[None]
    got = layer(x, buckets, visible)

    def silu(value: float) -> float:
        return value / (1 + math.exp(-value))

    def norm(row: list[float], weight: Tensor, bias: Tensor) -> list[float]:
        mean = sum(row) / len(row)
        variance = sum((value - mean) ** 2 for value in row) / len(row)
        return [
            (value - mean) / math.sqrt(variance + 1e-5) * float(w) + float(b)
            for value, w, b in zip(row, weight, bias, strict=True)
        ]

    def linear(row: list[float], weight: Tensor) -> list[float]:
        return [sum(float(w) * v for w, v in zip(line, row, strict=True)) for line in weight]

    width = dim // heads
    for b in range(batch):
        mixed = [
            [silu(value) for value in linear(normed, layer.uvqk.weight)]
            for normed in (
                norm(row.tolist(), layer.input_norm.weight, layer.input_norm.bias) for row in x[b]
            )
        ]
        for i in range(size):
            pooled = [0.0] * dim
            for head in range(heads):
                part = range(head * width, (head + 1) * width)
                for j in range(i + 1):
                    score = sum(mixed[i][2 * dim + c] * mixed[j][3 * dim + c] for c in part)
                    score += float(layer.bias.by_distance[i - j])
                    score += float(layer.bias.by_time[buckets[b, i, j]])
                    for c in part:
                        pooled[c] += silu(score) / num_rows * mixed[j][dim + c]
            normed = norm(pooled, layer.attention_norm.weight, layer.attention_norm.bias)
            gated = [value * mixed[i][c] for c, value in enumerate(normed)]
            out = linear(gated, layer.output.weight)
            want = [float(x[b, i, c]) + out[c] + float(layer.output.bias[c]) for c in range(dim)]
            torch.testing.assert_close(got[b, i], torch.tensor(want, dtype=torch.float64))


def test_time_buckets_are_half_octaves_of_seconds_cut_at_whole_microseconds() -> None:
    bounds = time_bucket_bounds(64)
    assert bounds[:4].tolist() == [414_214, 1_000_000, 1_828_428, 3_000_000]
    assert bool((bounds.diff() > 0).all())
    assert time_bucket_bounds(200)[-1] > 0  # does not overflow
    elapsed = torch.tensor([0, 414_213, 414_214, 999_999, 1_000_000, 10**18])
    assert torch.bucketize(elapsed, bounds, right=True).tolist() == [0, 0, 1, 1, 2, 63]


@settings(max_examples=20)
@given(lengths=st.lists(st.integers(0, 8), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_a_batch_gives_what_each_example_gives_alone(lengths: list[int], seed: int) -> None:
    model, inputs = make_model(), make_inputs(lengths, seed)
    with torch.no_grad():
        together = model.user_states(inputs)
        losses = model(inputs)
        alone, next_item, label = [], 0.0, 0.0
        for row in range(len(lengths)):
            one = inputs.select(torch.arange(len(lengths)) == row)
            assert one.lengths.tolist() == [lengths[row]]
            alone.append(model.user_states(one))
            parts = model(one)
            next_item += float(parts.next_item)
            label += float(parts.label)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-10, atol=1e-12)
    assert float(losses.next_item) == pytest.approx(next_item, rel=1e-9)
    assert float(losses.label) == pytest.approx(label, rel=1e-9)


@settings(max_examples=20)
@given(seed=st.integers(0, 99), changed=st.integers(0, 6))
def test_changing_an_event_never_changes_the_states_before_it(seed: int, changed: int) -> None:
    model, inputs = make_model(), make_inputs([7], seed)
    later = torch.arange(7) >= changed
    # Row `changed` knows when event `changed` is asked for, so that one time stays as it is.
    times = torch.where(torch.arange(7) > changed, inputs.times_us + 10**12, inputs.times_us)
    other = ModelInputs(
        items=torch.where(later, (inputs.items + 1) % NUM_ITEMS, inputs.items),
        times_us=times,
        offsets=inputs.offsets,
        query_time_us=inputs.query_time_us + 2 * 10**12,
        traits={name: torch.where(later, v + 1, v) for name, v in inputs.traits.items()},
        targets=inputs.targets,
        labels=inputs.labels,
    )
    with torch.no_grad():
        before, after = model.encode(inputs)[0], model.encode(other)[0]
    assert torch.equal(before[: changed + 1], after[: changed + 1])
    assert not torch.equal(before[changed + 1 :], after[changed + 1 :])


def test_the_request_time_matters_and_only_to_the_last_state() -> None:
    model, inputs = make_model(), make_inputs([5])
    later = ModelInputs(**{**vars(inputs), "query_time_us": inputs.query_time_us + 10**13})
    with torch.no_grad():
        before, after = model.encode(inputs)[0], model.encode(later)[0]
    assert torch.equal(before[:-1], after[:-1])
    assert not torch.equal(before[-1], after[-1])


def test_empty_histories_have_a_state_and_learn_their_target() -> None:
    model = make_model()
    inputs = make_inputs([0, 0, 0])
    inputs = ModelInputs(**{**vars(inputs), "targets": torch.tensor([3, 0, 5])})
    losses = model(inputs)
    assert losses.num_targets == 2  # the unknown target is not predicted
    assert losses.num_labels == 3
    (losses.next_item + losses.label).backward()
    assert model.start.grad is not None
    assert bool(model.start.grad.abs().sum() > 0)


def test_every_parameter_gets_a_gradient() -> None:
    model = make_model()
    losses = model(make_inputs([8, 3, 0, 5]))
    (losses.next_item + losses.label).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.abs().sum() > 0), name


def test_an_empty_batch_has_no_loss_but_gives_every_parameter_a_gradient_of_zero() -> None:
    model = make_model().float()
    losses = model(ModelInputs.empty(("action", "category"), labels=True))
    assert losses.num_targets == losses.num_labels == 0
    (losses.next_item + losses.label).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad == 0).all()), name


def test_trait_values_out_of_range_share_one_embedding() -> None:
    embedding = make_model().trait_embeddings["action"]
    values = embedding(torch.tensor([0, 3, 4, -1, 10**12]))
    assert not torch.equal(values[0], values[1])
    assert torch.equal(values[2], values[3])
    assert torch.equal(values[2], values[4])
    assert torch.equal(embedding(torch.tensor([3.0, 3.5])), values[1].expand(2, -1))
    assert torch.equal(embedding(torch.tensor([False])), values[:1])


def test_hashed_traits_take_any_value_and_spread_it() -> None:
    embedding = make_model().trait_embeddings["category"]
    rows = embedding(torch.arange(-500, 500) * 1_000_003)
    assert len(torch.unique(rows, dim=0)) == 7


def test_unknown_items_are_never_recommended() -> None:
    model = make_model()
    scores = model.score_items(model.user_states(make_inputs([4, 0])))
    assert scores.shape == (2, NUM_ITEMS)
    assert scores[:, 0].tolist() == [-math.inf, -math.inf]
    assert bool(scores[:, 1:].isfinite().all())


@pytest.mark.parametrize("rows", [0, 1, 1024, 2500])
def test_the_full_softmax_is_the_sum_over_rows_whatever_the_chunks(rows: int) -> None:
    torch.manual_seed(0)
    states = torch.randn(rows, 4, dtype=torch.float64, requires_grad=True)
    items = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(1, 11, (rows,))
    loss = full_softmax_loss(states, items, targets, 3.0)
    loss.backward()
    got = (states.grad, items.grad)
    states.grad = items.grad = None
    picked = (3.0 * states @ items[1:].T).log_softmax(-1)[torch.arange(rows), targets - 1]
    (-picked.sum()).backward()
    torch.testing.assert_close(loss, -picked.sum())
    torch.testing.assert_close(got, (states.grad, items.grad))


def test_the_log_uniform_law_sums_to_one() -> None:
    assert float(log_uniform_log_probability(torch.arange(1, 999), 999).exp().sum()) == (
        pytest.approx(1)
    )


def test_the_sampled_softmax_estimates_the_full_one() -> None:
    torch.manual_seed(0)
    states, items = torch.randn(40, 4), torch.randn(25, 4)
    targets = torch.randint(1, 25, (40,))
    full = float(full_softmax_loss(states, items, targets, 1.0))
    sampled = float(sampled_softmax_loss(states, items, targets, 1.0, 100_000))
    assert sampled == pytest.approx(full, rel=0.01)


@torch.no_grad()
def test_a_model_above_the_limit_uses_the_sampled_softmax() -> None:
    config = HSTUConfig(
        max_length=8, dim=12, num_heads=3, dropout=0.0, full_softmax_max_items=10, num_negatives=5
    )
    model = make_model(config)
    inputs = make_inputs([8, 2])
    torch.manual_seed(0)
    first = float(model(inputs).next_item)
    assert first != float(model(inputs).next_item)  # other negatives
    torch.manual_seed(0)
    assert first == float(model(inputs).next_item)


def test_too_long_a_history_is_refused() -> None:
    with pytest.raises(SchemaError, match="holds 9 events, but the model takes 8"):
        make_model().encode(make_inputs([9]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 10, "num_heads": 3}, "dim=10 does not divide into num_heads=3"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"max_length": True}, "max_length=True"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"traits": (CategoricalTrait("a", 2), CategoricalTrait("a", 3))}, "name one twice"),
    ],
)
def test_a_bad_shape_is_refused_with_its_value(options: dict[str, object], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        HSTUConfig(**options)  # type: ignore[arg-type]


def test_a_bad_trait_is_refused() -> None:
    with pytest.raises(SchemaError, match="num_values=0"):
        CategoricalTrait("action", 0)
    with pytest.raises(SchemaError, match="encoding='onehot'"):
        CategoricalTrait("action", 3, "onehot")  # type: ignore[arg-type]
    with pytest.raises(SchemaError, match="Bad Name"):
        CategoricalTrait("Bad Name", 3)


def test_a_vocabulary_without_items_is_refused() -> None:
    with pytest.raises(SchemaError, match="holds no item"):
        HSTU(CONFIG, 1)


def test_a_config_survives_json_and_refuses_what_it_does_not_know() -> None:
    assert HSTUConfig.from_json(CONFIG.to_json()) == CONFIG
    with pytest.raises(SchemaError, match="'num_experts', which is unknown"):
        HSTUConfig.from_json({**CONFIG.to_json(), "num_experts": 4})


def test_configs_load_without_torch() -> None:
    code = (
        "import sys, vlm_dagster.training.config, vlm_dagster.training.checkpoint, "
        "vlm_dagster.models\n"
        "vlm_dagster.models.HSTUConfig()\n"
        "assert 'torch' not in sys.modules and 'dagster' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
