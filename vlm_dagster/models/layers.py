"""One HSTU layer and its relative bias by position and time (arXiv 2402.17152, equations 1-3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["HSTULayer", "RelativeBias", "time_bucket_bounds"]


def time_bucket_bounds(num_buckets: int) -> Tensor:
    """int64 [num_buckets - 1] rising upper bounds of elapsed microseconds, half-octaves apart.

    Bucket b holds elapsed times in [2^(b/2) - 1, 2^((b+1)/2) - 1) seconds; the last is open.
    Integers, so that a bucket never depends on how a device rounds a logarithm.
    """
    half_octaves = torch.arange(1, num_buckets, dtype=torch.float64) / 2
    seconds = (2.0**half_octaves - 1.0).clamp(max=2.0**42)  # 2^42 s in us still fits an int64
    return (seconds * 1e6).ceil().to(torch.int64)


class RelativeBias(nn.Module):
    """A learned scalar for each distance in rows, plus one for each bucket of elapsed time.

    The bucket after the last belongs to the start token, which has no time.
    """

    def __init__(self, num_rows: int, num_time_buckets: int) -> None:
        super().__init__()
        self.by_distance = nn.Parameter(torch.empty(num_rows))
        self.by_time = nn.Parameter(torch.empty(num_time_buckets + 1))
        nn.init.normal_(self.by_distance, std=0.02)
        nn.init.normal_(self.by_time, std=0.02)

    def forward(self, time_buckets: Tensor) -> Tensor:
        """[B, N, N] bias of query row i on key row j <= i, from int64 [B, N, N] buckets."""
        size = time_buckets.shape[-1]
        rows = torch.arange(size, device=time_buckets.device)
        distance = (rows[:, None] - rows[None, :]).clamp(min=0)
        # With so few destinations, the backward of `gather` is some 50 times as fast on a CPU as
        # those of `embedding` and of indexing.
        by_time = self.by_time.gather(0, time_buckets.reshape(-1)).view(time_buckets.shape)
        by_distance = self.by_distance.gather(0, distance.reshape(-1)).view(distance.shape)
        return by_time + by_distance


class HSTULayer(nn.Module):
    """U,V,Q,K = split(SiLU(linear(norm(x)))); y = x + linear(norm(A V) * U), with the pointwise
    attention A = SiLU(Q K^T + bias) / n over earlier rows, n = the most rows there can be.

    n is a constant, not the padded size of this batch, so that padding never changes a result.
    """

    def __init__(
        self, dim: int, num_heads: int, num_rows: int, num_time_buckets: int, dropout: float
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_rows = num_rows
        self.input_norm = nn.LayerNorm(dim)
        self.uvqk = nn.Linear(dim, 4 * dim, bias=False)
        self.bias = RelativeBias(num_rows, num_time_buckets)
        self.attention_norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.normal_(self.uvqk.weight, std=0.02)

    def forward(self, x: Tensor, time_buckets: Tensor, visible: Tensor) -> Tensor:
        """[B, N, dim] to the same.

        Args:
            x: [B, N, dim].
            time_buckets: int64 [B, N, N].
            visible: bool [B or 1, N, N]; whether row i may look at row j.
        """
        batch, size, dim = x.shape
        u, v, q, k = F.silu(self.uvqk(self.input_norm(x))).chunk(4, dim=-1)
        shape = (batch, size, self.num_heads, dim // self.num_heads)
        v, q, k = (t.view(shape).transpose(1, 2) for t in (v, q, k))
        scores = q @ k.transpose(-1, -2) + self.bias(time_buckets)[:, None]
        attention = F.silu(scores).masked_fill(~visible[:, None], 0.0) / self.num_rows
        pooled = (attention @ v).transpose(1, 2).reshape(batch, size, dim)
        residual: Tensor = self.output(self.dropout(self.attention_norm(pooled) * u))
        return x + residual
