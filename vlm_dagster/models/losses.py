"""Next-item losses over a tied item embedding: full and sampled softmax."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["full_softmax_loss", "log_uniform_log_probability", "sampled_softmax_loss"]


# Rows of logits alive at once: few enough to stay near the cache, and to bound memory by
# _CHUNK * V rather than by events * V.
_CHUNK = 1_024


def _chunk_loss(states: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(states @ items[1:].T, targets - 1, reduction="sum")


def full_softmax_loss(states: Tensor, items: Tensor, targets: Tensor, scale: float) -> Tensor:
    """Sum over rows of -log softmax(scale * states @ items^T)[target], items 1..V-1 competing.

    Logits are made again in the backward pass instead of being kept.

    Args:
        states: [R, dim].
        items: [V, dim] item embeddings; row 0 (unknown) takes no part.
        targets: int64 [R], each in 1..V-1.
        scale: factor on the dot products.
    """
    scaled = states * scale
    total = _chunk_loss(scaled[:0], items, targets[:0])
    for rows, wanted in zip(torch.split(scaled, _CHUNK), torch.split(targets, _CHUNK), strict=True):
        total = total + checkpoint(
            _chunk_loss, rows, items, wanted, use_reentrant=False, preserve_rng_state=False
        )
    return total


def log_uniform_log_probability(indices: Tensor, num_items: int) -> Tensor:
    """log q of drawing each index from the log-uniform law over 1..num_items-1.

    q(i) = log((i + 1) / i) / log(num_items): Zipf's law for items sorted by falling frequency,
    as a vocabulary is.
    """
    i = indices.to(torch.float64)
    return torch.log(torch.log1p(1 / i) / math.log(num_items))


def sampled_softmax_loss(
    states: Tensor, items: Tensor, targets: Tensor, scale: float, num_negatives: int
) -> Tensor:
    """As `full_softmax_loss`, against negatives drawn with replacement and shared by all rows.

    Each negative's logit is lowered by the log of its item's expected count among the draws (logQ
    correction); draws that hit the row's own target are masked, and the target's own logit stays
    as it is. So the partition function is estimated without bias. (Correcting the target's logit
    too, as is often done, would not be: it is there with certainty, not by a draw.)
    """
    num_items = items.shape[0]
    uniform = torch.rand(num_negatives, dtype=torch.float64, device=items.device)
    # The inverse of the law's distribution function, log(i + 1) / log(num_items).
    negatives = torch.exp(uniform * math.log(num_items)).floor().to(torch.int64)
    negatives = negatives.clamp(1, num_items - 1)
    expected = log_uniform_log_probability(negatives, num_items) + math.log(num_negatives)
    scaled = states * scale
    positive = (scaled * items[targets]).sum(-1, keepdim=True)
    negative = scaled @ items[negatives].T - expected.to(scaled.dtype)
    negative = negative.masked_fill(targets[:, None] == negatives, -math.inf)
    logits = torch.cat([positive, negative], dim=1)
    return F.cross_entropy(logits, torch.zeros_like(targets), reduction="sum")
