"""What the model reads: a batch of jagged histories with items as vocabulary indices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ModelInputs", "pad", "row_mask"]

Convert = Callable[[Tensor], Tensor]


def row_mask(lengths: Tensor, size: int) -> Tensor:
    """bool [B, size]: which of the first `size` places a sequence of that length fills."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def pad(values: Tensor, lengths: Tensor, size: int, fill: int = 0) -> Tensor:
    """Jagged [sum(lengths)] to dense [B, size]; padding stands on the right."""
    dense = values.new_full((lengths.numel(), size), fill)
    dense[row_mask(lengths, size)] = values
    return dense


@dataclass(frozen=True)
class ModelInputs:
    """B histories, each oldest event first, and what is asked after each of them.

    Attributes:
        items: int64 [sum(lengths)] vocabulary index of each event's item; 0 is an unknown item.
        times_us: int64 [sum(lengths)] UTC microseconds.
        offsets: int64 [B + 1]; history b is [offsets[b], offsets[b + 1]). May be empty.
        query_time_us: int64 [B] when the prediction after the history is asked for.
        traits: name to [sum(lengths)] raw trait values, any integer, float or bool type.
        targets: int64 [B] vocabulary index of the item each example is about; 0 is an unknown
            item. None if there is none.
        labels: float32 [B] in {0, 1}, or None.
    """

    items: Tensor
    times_us: Tensor
    offsets: Tensor
    query_time_us: Tensor
    traits: Mapping[str, Tensor] = field(default_factory=dict)
    targets: Tensor | None = None
    labels: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """int64 [B]."""
        return self.offsets.diff()

    @property
    def num_examples(self) -> int:
        return self.offsets.numel() - 1

    def _map(self, event: Convert, example: Convert, offsets: Tensor) -> Self:
        return type(self)(
            items=event(self.items),
            times_us=event(self.times_us),
            offsets=offsets,
            query_time_us=example(self.query_time_us),
            traits={name: event(column) for name, column in self.traits.items()},
            targets=None if self.targets is None else example(self.targets),
            labels=None if self.labels is None else example(self.labels),
        )

    def to(self, device: torch.device | str) -> Self:
        """The same with every tensor on `device`."""

        def move(column: Tensor) -> Tensor:
            return column.to(device)

        return self._map(move, move, move(self.offsets))

    def select(self, chosen: Tensor) -> Self:
        """The examples that bool [B] chooses, in order, with their histories."""
        lengths = self.lengths
        events = chosen.repeat_interleave(lengths)
        offsets = F.pad(lengths[chosen].cumsum(0), (1, 0))
        return self._map(lambda column: column[events], lambda column: column[chosen], offsets)

    @classmethod
    def empty(cls, traits: Iterable[str], *, labels: bool) -> Self:
        """No example at all: what a rank feeds whose share is used up."""
        none = torch.zeros(0, dtype=torch.int64)
        return cls(
            items=none,
            times_us=none,
            offsets=torch.zeros(1, dtype=torch.int64),
            query_time_us=none,
            traits=dict.fromkeys(traits, none),
            targets=none,
            labels=torch.zeros(0) if labels else None,
        )
