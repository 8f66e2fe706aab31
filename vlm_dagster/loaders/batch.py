"""What a training step gets: examples, and for each feature group a jagged batch of sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from vlm_dagster.errors import SchemaError

__all__ = ["Batch", "JaggedSequence"]


@dataclass(frozen=True)
class JaggedSequence:
    """B sequences of one feature group, one after another, each oldest event first.

    Attributes:
        values: per trait, [sum(lengths)]. Times are int64 UTC microseconds.
        offsets: [B + 1] int64; sequence i is `[offsets[i], offsets[i + 1])`.
    """

    values: dict[str, Tensor]
    offsets: Tensor

    @property
    def lengths(self) -> Tensor:
        """[B] int64."""
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def num_events(self) -> int:
        return int(self.offsets[-1])

    def to_padded(
        self,
        trait: str,
        max_length: int | None = None,
        *,
        value: float = 0,
        side: Literal["left", "right"] = "right",
    ) -> Tensor:
        """[B, max_length] of one trait; a longer sequence keeps its newest events.

        Args:
            max_length: None means the longest of this batch.
            value: what stands where there is no event.
            side: where the padding goes; "right" lets every sequence begin in column 0, "left"
                lets every sequence end in the last column.
        """
        if side not in ("left", "right"):
            raise SchemaError(f"side={side!r}", "Use 'left' or 'right'.")
        lengths = self.lengths
        width = max_length
        if width is None:
            width = int(lengths.max()) if len(lengths) else 0
        kept = lengths.clamp(max=width)
        column = torch.arange(width, device=self.offsets.device)
        if side == "right":
            inside = column < kept[:, None]
            source = (self.offsets[1:] - kept)[:, None] + column
        else:
            inside = column >= (width - kept)[:, None]
            source = self.offsets[1:, None] - width + column
        flat = self.values[trait]
        padded = flat.new_full((len(lengths), width), value)
        padded[inside] = flat[source[inside]]
        return padded

    def _map(self, change: Callable[[Tensor], Tensor]) -> JaggedSequence:
        values = {name: change(tensor) for name, tensor in self.values.items()}
        return JaggedSequence(values, change(self.offsets))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> JaggedSequence:
        """A copy on a device."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> JaggedSequence:
        """A copy in page-locked memory, from which transfers to a GPU need not wait."""
        return self._map(lambda t: t.pin_memory())


@dataclass(frozen=True)
class Batch:
    """B examples with their rebuilt sequences.

    Attributes:
        examples: `user_id`, `request_id`, `request_time` (int64 UTC microseconds) and the declared
            columns, each [B]; those that are strings stand in `strings` instead.
        sequences: per feature group.
        strings: per string column, a list of B.
    """

    examples: dict[str, Tensor]
    sequences: dict[str, JaggedSequence]
    strings: dict[str, list[str]] = field(default_factory=dict)

    @property
    def batch_size(self) -> int:
        return int(self.examples["request_time"].shape[0])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """A copy on a device; strings stay where they are."""
        return Batch(
            {n: t.to(device, non_blocking=non_blocking) for n, t in self.examples.items()},
            {g: s.to(device, non_blocking=non_blocking) for g, s in self.sequences.items()},
            self.strings,
        )

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory."""
        return Batch(
            {name: tensor.pin_memory() for name, tensor in self.examples.items()},
            {group: sequence.pin_memory() for group, sequence in self.sequences.items()},
            self.strings,
        )
