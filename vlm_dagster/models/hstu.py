"""A sequential recommender of HSTU layers over one feature group's history (arXiv 2402.17152).

Row 0 is a learned start token, row r >= 1 holds event r - 1, and the state of row r predicts
event r: so an empty history has a state too. Row r also knows *when* event r is asked for (the
request time, after the last event), as a server does; it knows nothing else of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_dagster.errors import SchemaError
from vlm_dagster.models.config import CategoricalTrait, HSTUConfig
from vlm_dagster.models.inputs import ModelInputs, pad, row_mask
from vlm_dagster.models.layers import HSTULayer, time_bucket_bounds
from vlm_dagster.models.losses import full_softmax_loss, sampled_softmax_loss

__all__ = ["HSTU", "LossSums"]


class LossSums(NamedTuple):
    """Sums, not means, so that ranks with unequal shares add up to the loss of the whole batch.

    Attributes:
        next_item: scalar, nats; sum over all rows whose target is a known item.
        num_targets: how many rows that were.
        label: scalar, nats; sum of the binary cross-entropy of the examples' labels.
        num_labels: how many labels that were.
    """

    next_item: Tensor
    num_targets: int
    label: Tensor
    num_labels: int


class TraitEmbedding(nn.Module):
    """Embeds one categorical trait. Index 0 of encoding "code" is every value out of range."""

    def __init__(self, trait: CategoricalTrait, dim: int) -> None:
        super().__init__()
        self.trait = trait
        self.table = nn.Embedding(trait.num_values + (trait.encoding == "code"), dim)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, values: Tensor) -> Tensor:
        """[...] raw values to [..., dim]."""
        if values.is_floating_point():
            values = values.floor()
        values = values.to(torch.int64)
        size = self.trait.num_values
        if self.trait.encoding == "hash":
            # Fibonacci hashing: the product wraps; its high bits are well mixed.
            index = ((values * -7046029254386353131) >> 33) % size
        else:
            index = torch.where((values >= 0) & (values < size), values + 1, 0)
        embedded: Tensor = self.table(index)
        return embedded


@dataclass(frozen=True)
class _Rows:
    """Histories laid out in rows: [B, N + 1], the start token at row 0."""

    x: Tensor
    time_buckets: Tensor
    visible: Tensor


class HSTU(nn.Module):
    """Scores the next item of a user, and optionally a binary label of (user, item).

    Args:
        config: the model's shape.
        num_items: V, the size of the vocabulary including index 0 for unknown items.
    """

    time_bounds: Tensor

    def __init__(self, config: HSTUConfig, num_items: int) -> None:
        super().__init__()
        if num_items < 2:
            raise SchemaError(
                f"num_items={num_items}: the vocabulary holds no item",
                "Train on windows that hold events, or lower the vocabulary's min_count.",
            )
        self.config = config
        self.num_items = num_items
        dim, num_rows = config.dim, config.max_length + 1
        self.item_embedding = nn.Embedding(num_items, dim)
        nn.init.normal_(self.item_embedding.weight, std=0.02)
        self.start = nn.Parameter(torch.randn(dim) * 0.02)
        self.trait_embeddings = nn.ModuleDict(
            {trait.name: TraitEmbedding(trait, dim) for trait in config.traits}
        )
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            HSTULayer(dim, config.num_heads, num_rows, config.num_time_buckets, config.dropout)
            for _ in range(config.num_layers)
        )
        self.label_head = (
            nn.Sequential(nn.Linear(3 * dim, dim), nn.SiLU(), nn.Linear(dim, 1))
            if config.label_head
            else None
        )
        bounds = time_bucket_bounds(config.num_time_buckets)
        self.register_buffer("time_bounds", bounds, persistent=False)

    def _rows(self, inputs: ModelInputs) -> _Rows:
        lengths = inputs.lengths
        size = int(lengths.max()) if lengths.numel() else 0
        if size > self.config.max_length:
            raise SchemaError(
                f"a history holds {size} events, but the model takes {self.config.max_length}",
                "Give the projection the model's max_length.",
            )
        batch = lengths.numel()
        x = self.item_embedding(pad(inputs.items, lengths, size)) * math.sqrt(self.config.dim)
        for name, embedding in self.trait_embeddings.items():
            x = x + embedding(pad(inputs.traits[name], lengths, size))
        x = torch.cat([self.start.expand(batch, 1, -1), self.dropout(x)], dim=1)

        times = pad(inputs.times_us, lengths, size + 1)
        asked = times.scatter(1, lengths[:, None], inputs.query_time_us[:, None])
        elapsed = asked[:, :, None] - times[:, None, :-1]
        buckets = torch.bucketize(elapsed, self.time_bounds, right=True)
        buckets = F.pad(buckets, (1, 0), value=self.config.num_time_buckets)

        rows = torch.arange(size + 1, device=x.device)
        visible = (rows[:, None] >= rows[None, :])[None]
        return _Rows(x, buckets, visible)

    def encode(self, inputs: ModelInputs) -> Tensor:
        """[B, N + 1, dim] unit-length states, N = the longest history here; state r of a history
        predicts its event r. States past row `length` belong to padding and mean nothing."""
        rows = self._rows(inputs)
        x = rows.x
        for layer in self.layers:
            x = layer(x, rows.time_buckets, rows.visible)
        return F.normalize(x, dim=-1)

    def user_states(self, inputs: ModelInputs) -> Tensor:
        """[B, dim] unit-length states after the whole history."""
        states = self.encode(inputs)
        return states[torch.arange(len(states), device=states.device), inputs.lengths]

    def _item_vectors(self) -> Tensor:
        return F.normalize(self.item_embedding.weight, dim=-1)

    def score_items(self, user_states: Tensor) -> Tensor:
        """[B, V] next-item logits; the unknown item scores -inf."""
        scores = user_states @ self._item_vectors().T / self.config.temperature
        scores[:, 0] = -math.inf
        return scores

    def label_logits(self, user_states: Tensor, candidates: Tensor) -> Tensor:
        """[B] logits of the binary label for int64 [B] candidate items."""
        if self.label_head is None:
            raise SchemaError("this model has no label head", "Train it with a label column.")
        items = F.normalize(self.item_embedding(candidates), dim=-1)
        logits: Tensor = self.label_head(
            torch.cat([user_states, items, user_states * items * self.config.dim], dim=-1)
        ).squeeze(-1)
        return logits

    def forward(self, inputs: ModelInputs) -> LossSums:
        """The losses of one batch: each event predicted from those before it, and the example's
        own target from the whole history. Unknown items are not predicted."""
        lengths = inputs.lengths
        states = self.encode(inputs)
        size = states.shape[1]
        targets = pad(inputs.items, lengths, size)
        if inputs.targets is not None:
            targets = targets.scatter(1, lengths[:, None], inputs.targets[:, None])
        wanted = row_mask(lengths + 1, size) & (targets > 0)
        chosen, scale = states[wanted], 1 / self.config.temperature
        items = self._item_vectors()
        if self.num_items <= self.config.full_softmax_max_items:
            next_item = full_softmax_loss(chosen, items, targets[wanted], scale)
        else:
            next_item = sampled_softmax_loss(
                chosen, items, targets[wanted], scale, self.config.num_negatives
            )
        if self.label_head is None or inputs.labels is None or inputs.targets is None:
            return LossSums(next_item, len(chosen), next_item.new_zeros(()), 0)
        users = states[torch.arange(len(states), device=states.device), lengths]
        logits = self.label_logits(users, inputs.targets)
        label = F.binary_cross_entropy_with_logits(
            logits, inputs.labels.to(logits.dtype), reduction="sum"
        )
        return LossSums(next_item, len(chosen), label, len(logits))
