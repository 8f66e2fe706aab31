"""Ranking metrics and normalized entropy, by hand and against plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm_dagster.errors import SchemaError
from vlm_dagster.training.metrics import NormalizedEntropy, RankingMetrics, target_ranks


def test_ranks_count_better_items_and_ties_count_against_the_model() -> None:
    scores = torch.tensor([[9.0, 0.5, 0.9, 0.5, 0.1]]).expand(4, -1)
    assert target_ranks(scores, torch.tensor([2, 1, 3, 4])).tolist() == [1, 3, 3, 4]


def test_a_model_that_scores_all_items_alike_hits_nothing() -> None:
    assert target_ranks(torch.zeros(101), torch.arange(1, 101)).tolist() == [100] * 100


def test_a_score_that_is_not_a_number_never_helps() -> None:
    nan = math.nan
    scores = torch.tensor([[0.0, nan, 1.0, 2.0], [0.0, nan, nan, nan]])
    assert target_ranks(scores, torch.tensor([1, 2])).tolist() == [3, 3]
    assert target_ranks(scores, torch.tensor([3, 1])).tolist() == [2, 3]


def test_unknown_targets_and_seen_targets_rank_behind_every_item() -> None:
    scores = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).expand(3, -1)
    seen = torch.tensor([[False, True, False, False]]).expand(3, -1)
    assert target_ranks(scores, torch.tensor([0, 1, 2])).tolist() == [4, 1, 2]
    assert target_ranks(scores, torch.tensor([0, 1, 2]), seen=seen).tolist() == [4, 4, 1]


def test_hit_rate_and_ndcg_are_what_one_computes_by_hand() -> None:
    metrics = RankingMetrics([1, 10])
    metrics.update(torch.tensor([1, 3]))
    metrics.update(torch.tensor([11]))
    metrics.update_misses(1)
    assert metrics.num_queries == 4
    assert metrics.compute() == pytest.approx(
        {
            "hr@1": 1 / 4,
            "ndcg@1": 1 / 4,
            "hr@10": 2 / 4,
            "ndcg@10": (1 + 1 / 2) / 4,  # log2(1 + 3) is 2
            "mrr": (1 + 1 / 3 + 1 / 11) / 4,
        }
    )


@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.integers(0, 3), min_size=6, max_size=6),
            st.integers(0, 6),
            st.sets(st.integers(1, 6)),
        ),
        min_size=1,
        max_size=12,
    ),
    k=st.integers(1, 7),
    cut=st.integers(0, 12),
)
def test_ranking_equals_plain_python(
    rows: list[tuple[list[int], int, set[int]]], k: int, cut: int
) -> None:
    scores = torch.tensor([[99, *row] for row, _, _ in rows])
    targets = torch.tensor([target for _, target, _ in rows])
    seen = torch.zeros(len(rows), 7, dtype=torch.bool)
    for row, (_, _, items) in enumerate(rows):
        seen[row, sorted(items)] = True
    ranks = target_ranks(scores, targets, seen=seen)
    metrics = RankingMetrics([k])
    for part in (slice(0, cut), slice(cut, None)):
        metrics.update(ranks[part])

    hits = gain = 0.0
    for values, target, hidden in rows:
        if target == 0 or target in hidden:
            continue
        wanted = values[target - 1]
        others = [v for i, v in enumerate(values, start=1) if i != target and i not in hidden]
        rank = 1 + sum(1 for value in others if value >= wanted)
        if rank <= k:
            hits += 1
            gain += 1 / math.log2(rank + 1)
    if k < 7:  # rank 7 stands for "cannot be ranked"
        assert metrics.compute()[f"hr@{k}"] == pytest.approx(hits / len(rows))
        assert metrics.compute()[f"ndcg@{k}"] == pytest.approx(gain / len(rows))


def test_metrics_add_up_over_ranks() -> None:
    first, second, both = RankingMetrics([2]), RankingMetrics([2]), RankingMetrics([2])
    first.update(torch.tensor([1, 5]))
    second.update(torch.tensor([2]))
    both.update(torch.tensor([1, 5, 2]))
    theirs = second._sums
    first.reduce(lambda mine: mine + theirs)
    assert first.compute() == both.compute()


def test_no_query_gives_no_number() -> None:
    assert all(math.isnan(value) for value in RankingMetrics().compute().values())


@pytest.mark.parametrize("ks", [(), (0,), (True,), (2.5,)])
def test_bad_cut_offs_are_refused(ks: tuple[int, ...]) -> None:
    with pytest.raises(SchemaError, match="are not cut-offs"):
        RankingMetrics(ks)


def test_predicting_the_base_rate_has_a_normalized_entropy_of_one() -> None:
    entropy = NormalizedEntropy()
    rate = 1 / 4
    entropy.update(torch.full((4,), math.log(rate / (1 - rate))), torch.tensor([1.0, 0, 0, 0]))
    value = entropy.compute()
    assert value.ne == pytest.approx(1)
    assert value.base_rate == rate
    assert value.num_examples == 4
    assert value.reason is None


@given(
    examples=st.lists(st.tuples(st.floats(-30, 30), st.booleans()), min_size=2, max_size=30).filter(
        lambda xs: len({label for _, label in xs}) == 2
    ),
    cut=st.integers(0, 30),
)
def test_normalized_entropy_equals_plain_python(
    examples: list[tuple[float, bool]], cut: int
) -> None:
    entropy = NormalizedEntropy()
    for part in (examples[:cut], examples[cut:]):
        entropy.update(
            torch.tensor([logit for logit, _ in part], dtype=torch.float64),
            torch.tensor([float(label) for _, label in part]),
        )
    loss = sum(math.log1p(math.exp(-z if y else z)) for z, y in examples) / len(examples)
    rate = sum(y for _, y in examples) / len(examples)
    base = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    assert entropy.compute().log_loss == pytest.approx(loss)
    assert entropy.compute().ne == pytest.approx(loss / base)


@pytest.mark.parametrize(("label", "rate"), [(0.0, 0.0), (1.0, 1.0)])
def test_labels_of_one_class_have_no_normalized_entropy_and_say_why(
    label: float, rate: float
) -> None:
    entropy = NormalizedEntropy()
    entropy.update(torch.zeros(3), torch.full((3,), label))
    value = entropy.compute()
    assert math.isnan(value.ne)
    assert value.base_rate == rate
    assert value.log_loss == pytest.approx(math.log(2))
    assert value.reason == f"all 3 labels are {int(label)}, so the base rate has no entropy"


def test_no_label_at_all_is_said_too() -> None:
    assert NormalizedEntropy().compute().reason == "no example has a label"
