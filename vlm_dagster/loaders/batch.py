"""What a training step gets: examples, and for each feature group their sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlm_dagster.errors import SchemaError
from vlm_dagster.loaders.jagged import JaggedSequence
from vlm_dagster.loaders.merging import merge

__all__ = ["Batch", "JaggedSequence"]


@dataclass(frozen=True, eq=False)
class Batch:
    """B examples with their rebuilt sequences.

    Attributes:
        examples: `user_id`, `request_id`, `request_time` (int64 UTC microseconds) and the declared
            columns, each [B]; those that are strings stand in `strings` instead.
        sequences: per feature group, all in one form.
        strings: per string column, a list of B.
        num_padding: the last so many examples are no examples: zeros, empty strings and empty
            sequences, that fill a batch up.
    """

    examples: dict[str, Tensor]
    sequences: dict[str, JaggedSequence]
    strings: dict[str, list[str]] = field(default_factory=dict)
    num_padding: int = 0

    @property
    def batch_size(self) -> int:
        """B, padding included."""
        return int(self.examples["request_time"].shape[0])

    @property
    def num_bytes(self) -> int:
        """What moving it to another device moves."""
        examples = sum(tensor.nbytes for tensor in self.examples.values())
        return examples + sum(sequence.num_bytes for sequence in self.sequences.values())

    @property
    def dedupe_factor(self) -> float:
        """How often an event that is held is seen, over all groups; 1.0 if there is none."""
        held = sum(sequence.num_values for sequence in self.sequences.values())
        seen = sum(sequence.num_events for sequence in self.sequences.values())
        return seen / held if held else 1.0

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same on a device; strings stay where they are."""
        return Batch(
            {n: t.to(device, non_blocking=non_blocking) for n, t in self.examples.items()},
            {g: s.to(device, non_blocking=non_blocking) for g, s in self.sequences.items()},
            self.strings,
            self.num_padding,
        )

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory; itself where there is no accelerator to transfer to."""
        if not torch.accelerator.is_available():
            return self
        return Batch(
            {name: tensor.pin_memory() for name, tensor in self.examples.items()},
            {group: sequence.pin_memory() for group, sequence in self.sequences.items()},
            self.strings,
            self.num_padding,
        )

    def expand(self) -> Batch:
        """The same with every group in the expanded form, on the same device."""
        sequences = {group: sequence.expand() for group, sequence in self.sequences.items()}
        return Batch(self.examples, sequences, self.strings, self.num_padding)

    def merged(
        self,
        groups: Sequence[str] | None = None,
        *,
        by: str,
        traits: Sequence[str] | None = None,
        fill: Mapping[str, float] | None = None,
        max_length: int | None = None,
        group_column: str = "group",
    ) -> JaggedSequence:
        """Several groups as one sequence an example, interleaved in the order of time.

        Events come by the trait `by`, those of one instant in the order in which the groups are
        named, and those of one group in their order. Works on any device; with a `max_length` that
        cuts something off it waits for a GPU.

        Args:
            groups: in order; None takes all.
            by: a time that all of them have in their projections, `available_at` for example.
            traits: to keep; None keeps those that all groups have, or `fill` names.
            fill: what a trait is in the groups that lack it.
            max_length: the newest so many events of each example; None keeps all.
            group_column: the name of the trait that holds the group's number in `groups`: int8,
                int64 if there are more than 127.

        Returns:
            The expanded form, with the traits, `by` and the group's number.

        Raises:
            SchemaError: a group or trait is missing, a trait's types differ between groups, its fill
                is nothing that its type can hold, or `max_length` is negative.
        """
        names = list(self.sequences) if groups is None else list(groups)
        for name in names:
            if name not in self.sequences or names.count(name) > 1:
                problem = "named twice" if name in self.sequences else "not in this batch"
                raise SchemaError(
                    f"group {name!r} is {problem}", f"There are {', '.join(self.sequences)}."
                )
        return merge(
            {name: self.sequences[name] for name in names},
            by=by,
            traits=traits,
            fill=fill,
            max_length=max_length,
            group_column=group_column,
        )
