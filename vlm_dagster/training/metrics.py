"""Ranking and label metrics that add up over batches and ranks.

Ties count against the model: a target's rank is the number of items that score at least as much
as it does, itself included. So a model that scores all items alike gets nothing by chance, and a
score that is not a number never helps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_dagster.errors import SchemaError

__all__ = ["NormalizedEntropy", "NormalizedEntropyValue", "RankingMetrics", "target_ranks"]

Reduce = Callable[[Tensor], Tensor]


def target_ranks(scores: Tensor, targets: Tensor, *, seen: Tensor | None = None) -> Tensor:
    """int64 [B] 1-based pessimistic rank of each target among items 1..V-1.

    Args:
        scores: [B, V] or, the same for every row, [V]. Column 0 (the unknown item) takes no part.
        targets: int64 [B]. An unknown target (0) ranks behind every item: V.
        seen: bool [B, V] of items that take no part. A target that is among them ranks as
            unknown does.
    """
    rows = targets.numel()
    size = scores.shape[-1]
    scores = scores.expand(rows, size)
    target_scores = scores.gather(1, targets[:, None])
    # "not below", not "at or above": it also counts what compares false, i.e. NaN.
    rivals = ~(scores < target_scores)
    rivals[:, 0] = False
    lost = targets == 0
    if seen is not None:
        rivals &= ~seen
        lost = lost | seen.gather(1, targets[:, None]).squeeze(1)
    return torch.where(lost, size, rivals.sum(dim=1))


class RankingMetrics:
    """HR@K and NDCG@K of one relevant item a query, and the mean reciprocal rank (MRR).

    HR@K is the share of queries whose target ranks K or better; NDCG@K their mean of
    1 / log2(1 + rank), 0 beyond K (one relevant item, so the ideal DCG is 1).
    """

    def __init__(self, ks: Sequence[int] = (10,)) -> None:
        if not ks or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in ks):
            raise SchemaError(f"ks={ks!r} are not cut-offs", "Give integers of 1 or more.")
        self.ks = tuple(ks)
        # count, sum of reciprocal ranks, then hits and gains for each k. float64 counts exactly.
        self._sums = torch.zeros(2 + 2 * len(self.ks), dtype=torch.float64)

    def update(self, ranks: Tensor) -> None:
        """Add queries by the 1-based rank of their target, int64 [B]."""
        ranks = ranks.to(torch.float64)
        sums = [torch.ones_like(ranks), 1 / ranks]
        for k in self.ks:
            hit = (ranks <= k).to(torch.float64)
            sums += [hit, hit / torch.log2(1 + ranks)]
        self._sums += torch.stack(sums).sum(dim=1).cpu()

    def update_misses(self, num_queries: int) -> None:
        """Add queries whose target cannot be ranked at all: a miss at every K."""
        self._sums[0] += num_queries

    def reduce(self, all_sum: Reduce) -> None:
        """Add up over ranks. `all_sum` maps a float64 tensor to its sum over all ranks."""
        self._sums = all_sum(self._sums)

    @property
    def num_queries(self) -> int:
        return int(self._sums[0])

    def compute(self) -> dict[str, float]:
        """`hr@K` and `ndcg@K` for each K, and `mrr`; NaN where no query was added."""
        count = self._sums[0]
        values = {}
        for place, k in enumerate(self.ks):
            values[f"hr@{k}"] = float(self._sums[2 + 2 * place] / count)
            values[f"ndcg@{k}"] = float(self._sums[3 + 2 * place] / count)
        return {**values, "mrr": float(self._sums[1] / count)}


@dataclass(frozen=True)
class NormalizedEntropyValue:
    """Normalized entropy of predictions, and what it is made of.

    Attributes:
        ne: log_loss / entropy of base_rate; 1 is no better than always predicting the base
            rate, lower is better. NaN where it is undefined.
        log_loss: mean, in nats.
        base_rate: share of positive labels in the evaluated examples themselves.
        num_examples: how many labels.
        reason: why `ne` is NaN, or None.
    """

    ne: float
    log_loss: float
    base_rate: float
    num_examples: int
    reason: str | None = None


class NormalizedEntropy:
    """NE of binary predictions (He et al., 2014, "Practical lessons from predicting clicks")."""

    def __init__(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64)  # count, positives, log loss

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add examples: logits [B], labels [B] in {0, 1}."""
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logits.to(torch.float64), labels.to(torch.float64), reduction="sum"
        )
        self._sums += torch.stack(
            [loss.new_tensor(labels.numel()), labels.to(torch.float64).sum(), loss]
        ).cpu()

    def reduce(self, all_sum: Reduce) -> None:
        """Add up over ranks. `all_sum` maps a float64 tensor to its sum over all ranks."""
        self._sums = all_sum(self._sums)

    def compute(self) -> NormalizedEntropyValue:
        count, positives, loss = self._sums.tolist()
        if not count:
            nan = math.nan
            return NormalizedEntropyValue(nan, nan, nan, 0, "no example has a label")
        rate, log_loss = positives / count, loss / count
        if rate in (0.0, 1.0):
            reason = f"all {int(count)} labels are {int(rate)}, so the base rate has no entropy"
            return NormalizedEntropyValue(math.nan, log_loss, rate, int(count), reason)
        entropy = -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))
        return NormalizedEntropyValue(log_loss / entropy, log_loss, rate, int(count))
