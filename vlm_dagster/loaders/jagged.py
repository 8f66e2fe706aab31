"""Jagged sequences: B sequences of one feature group over one set of values, in three forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_dagster.errors import SchemaError
from vlm_dagster.loaders.fills import check_fill, check_length
from vlm_dagster.loaders.options import Form

if TYPE_CHECKING:
    from torchrec import KeyedJaggedTensor

__all__ = ["JaggedSequence"]


@dataclass(frozen=True, eq=False)
class JaggedSequence:
    """B sequences of one feature group, each oldest event first.

    In every form, sequence b is `[starts[b], starts[b] + lengths[b])` of the values. The forms
    differ in how often an event stands in the values:

        expanded      once for each sequence it is part of; the sequences lie one after another.
        deduplicated  once for each distinct sequence: S of them lie one after another, and
                      `inverse` says which of them each example has (RecD's inverse-keyed jagged
                      tensor, arXiv 2211.05239).
        views         once: sequences that overlap share events.

    `expand()` makes the first of the others, on whatever device they are. Made with `expanded()`,
    `deduplicated()` and `views()`, not by calling the class. Nothing here waits for a GPU unless
    its docstring says so: sizes that the host has to know are kept as integers.

    Attributes:
        values: per trait, [N]. Times are int64 UTC microseconds.
        starts: [B] int64.
        lengths: [B] int64.
        num_events: sum(lengths): the events as the model sees them.
    """

    values: dict[str, Tensor]
    starts: Tensor
    lengths: Tensor
    num_events: int
    _longest: int | None = None
    _offsets: Tensor | None = None
    _inverse: Tensor | None = None

    # -- making one ------------------------------------------------------------------------------

    @classmethod
    def expanded(
        cls, values: Mapping[str, Tensor], offsets: Tensor, *, longest: int | None = None
    ) -> JaggedSequence:
        """Sequences one after another.

        Args:
            values: per trait, [N] with N = offsets[-1].
            offsets: [B + 1] int64; sequence b is `[offsets[b], offsets[b + 1])`.
            longest: the largest length, where the host knows it.
        """
        size = _size(values)
        num_events = int(offsets[-1]) if size is None else size
        return cls(dict(values), offsets[:-1], offsets.diff(), num_events, longest, offsets)

    @classmethod
    def deduplicated(
        cls,
        values: Mapping[str, Tensor],
        offsets: Tensor,
        inverse: Tensor,
        *,
        num_events: int | None = None,
        longest: int | None = None,
    ) -> JaggedSequence:
        """S distinct sequences one after another, and which of them each example has.

        Args:
            values: per trait, [N] with N = offsets[-1].
            offsets: [S + 1] int64 of the distinct sequences.
            inverse: [B] int64, each in [0, S).
            num_events: the sum of the B lengths; None works it out, and waits for a GPU.
            longest: the largest of the B lengths, where the host knows it.
        """
        _size(values)
        lengths = offsets.diff()[inverse]
        if num_events is None:
            num_events = int(lengths.sum())
        starts = offsets[:-1][inverse]
        return cls(dict(values), starts, lengths, num_events, longest, offsets, inverse)

    @classmethod
    def views(
        cls,
        values: Mapping[str, Tensor],
        starts: Tensor,
        lengths: Tensor,
        *,
        num_events: int | None = None,
        longest: int | None = None,
    ) -> JaggedSequence:
        """Sequences that may share events.

        Args:
            values: per trait, [N].
            starts, lengths: [B] int64; sequence b is `[starts[b], starts[b] + lengths[b])`.
            num_events: the sum of the lengths; None works it out, and waits for a GPU.
            longest: the largest length, where the host knows it.
        """
        _size(values)
        if starts.shape != lengths.shape:
            raise SchemaError(
                f"{len(starts)} starts, but {len(lengths)} lengths", "Give one of each a sequence."
            )
        if num_events is None:
            num_events = int(lengths.sum())
        return cls(dict(values), starts, lengths, num_events, longest)

    # -- what there is ---------------------------------------------------------------------------

    @property
    def form(self) -> Form:
        if self._inverse is not None:
            return "deduplicated"
        return "views" if self._offsets is None else "expanded"

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """The largest length, 0 if there is no sequence. Waits for a GPU if it was not given."""
        if self._longest is not None:
            return self._longest
        return int(self.lengths.max()) if self.batch_size else 0

    @property
    def num_values(self) -> int:
        """N: the events that are held."""
        return _size(self.values) or 0

    @property
    def dedupe_factor(self) -> float:
        """How often an event that is held is seen, num_events / num_values; 1.0 if there is none."""
        return self.num_events / self.num_values if self.num_values else 1.0

    @property
    def num_bytes(self) -> int:
        """What moving it to another device moves."""
        return sum(tensor.nbytes for tensor in (*self.values.values(), *self._layout))

    @property
    def _layout(self) -> tuple[Tensor, ...]:
        if self._offsets is None:
            return self.starts, self.lengths
        return (self._offsets,) if self._inverse is None else (self._offsets, self._inverse)

    @property
    def offsets(self) -> Tensor:
        """[B + 1] int64; sequence b is `[offsets[b], offsets[b + 1])`. Of the expanded form alone."""
        if self._offsets is None or self._inverse is not None:
            way_out = "Use starts and lengths, or expand() first."
            if self._inverse is not None:
                way_out = f"{way_out[:-1]}; unique.offsets has those of the distinct sequences."
            raise SchemaError(f"a sequence of the form {self.form!r} has no offsets", way_out)
        return self._offsets

    @property
    def inverse(self) -> Tensor:
        """[B] int64: which of the distinct sequences each example has. Of the deduplicated form."""
        if self._inverse is None:
            raise SchemaError(
                f"a sequence of the form {self.form!r} has no inverse",
                "Make the loader with form='deduplicated', or use starts and lengths, which every "
                "form has.",
            )
        return self._inverse

    @property
    def unique(self) -> JaggedSequence:
        """The S distinct sequences of the deduplicated form, as expanded ones. Nothing is copied."""
        assert self.inverse is not None  # says the way out
        assert self._offsets is not None
        # Every distinct sequence is some example's, so the longest is the same.
        return JaggedSequence.expanded(self.values, self._offsets, longest=self._longest)

    def _of(self, trait: str) -> Tensor:
        if trait not in self.values:
            raise SchemaError(
                f"no trait {trait!r} in this batch",
                f"There are {', '.join(self.values) or 'none'}: add it to the projection.",
            )
        return self.values[trait]

    # -- moving ----------------------------------------------------------------------------------

    def _with(self, values: dict[str, Tensor], layout: Sequence[Tensor]) -> JaggedSequence:
        """The same in other memory."""
        cls, longest = JaggedSequence, self._longest
        if self.form == "expanded":
            return cls.expanded(values, layout[0], longest=longest)
        make = cls.views if self.form == "views" else cls.deduplicated
        first, second = layout
        return make(values, first, second, num_events=self.num_events, longest=longest)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> JaggedSequence:
        """The same, in the same form, on a device; tensors that are there already are shared."""
        return self._with(
            {n: t.to(device, non_blocking=non_blocking) for n, t in self.values.items()},
            [t.to(device, non_blocking=non_blocking) for t in self._layout],
        )

    def pin_memory(self) -> JaggedSequence:
        """A copy in page-locked memory, from which transfers to a GPU need not wait; itself where
        there is no accelerator to transfer to."""
        if not torch.accelerator.is_available():
            return self
        return self._with(
            {name: tensor.pin_memory() for name, tensor in self.values.items()},
            [tensor.pin_memory() for tensor in self._layout],
        )

    # -- other shapes ----------------------------------------------------------------------------

    def _places(self) -> Tensor:
        """[num_events] where in the values each event of each sequence stands."""
        before = self.lengths.cumsum(0) - self.lengths
        shift = (self.starts - before).repeat_interleave(self.lengths, output_size=self.num_events)
        return shift + torch.arange(self.num_events, device=shift.device)

    def expand(self, traits: Sequence[str] | None = None) -> JaggedSequence:
        """The expanded form, on the same device; itself if it is expanded and all traits are asked.

        Args:
            traits: to keep, in order; None keeps all.
        """
        values = self.values if traits is None else {name: self._of(name) for name in traits}
        if self.form == "expanded":
            if traits is None:
                return self
            return JaggedSequence.expanded(values, self.offsets, longest=self._longest)
        places = self._places()
        return JaggedSequence.expanded(
            {name: tensor.index_select(0, places) for name, tensor in values.items()},
            F.pad(self.lengths.cumsum(0), (1, 0)),
            longest=self._longest,
        )

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

        Raises:
            SchemaError: no such trait, a negative length, or a value that the trait's type cannot hold.
        """
        if side not in ("left", "right"):
            raise SchemaError(f"side={side!r}", "Use 'left' or 'right'.")
        flat = self._of(trait)
        check_length(max_length)
        check_fill(trait, flat.dtype, value)
        width = self.longest if max_length is None else max_length
        if not len(flat):
            return flat.new_full((self.batch_size, width), value)
        column = torch.arange(width, device=flat.device)
        kept = self.lengths.clamp(max=width)
        first = (self.starts + self.lengths - kept)[:, None]
        if side == "right":
            outside = column >= kept[:, None]
            source = first + column
        else:
            padding = (width - kept)[:, None]
            outside = column < padding
            source = first - padding + column
        # Reading anything for the padding and then covering it: choosing what to read would make
        # the host wait for a GPU to say how much that is.
        return flat[source.clamp(0, len(flat) - 1)].masked_fill_(outside, value)

    def to_nested(self, trait: str) -> Tensor:
        """[B, (lengths)] of one trait, as a nested tensor of the jagged layout.

        Of the expanded form it shares the memory; the others are expanded, because nested tensors
        have no way to say that sequences overlap.
        """
        whole = self.expand([trait])
        return torch.nested.nested_tensor_from_jagged(
            whole.values[trait], whole.offsets, max_seqlen=self._longest
        )

    def to_kjt(
        self, traits: Sequence[str] | None = None, *, unique: bool = False
    ) -> KeyedJaggedTensor:
        """TorchRec's KeyedJaggedTensor: one key a trait, each with the B sequences.

        A KeyedJaggedTensor has values of one type. Whole numbers and booleans come as the widest
        type among them, floats likewise; both at once are refused.

        Args:
            traits: the keys, in order; None takes all.
            unique: of the deduplicated form, the S distinct sequences and their `inverse_indices`,
                so that an EmbeddingBagCollection looks each up and pools it once.

        Raises:
            SchemaError: torchrec is not installed, types that do not go together, no such trait, one
                that is named twice, or `unique` of another form.
        """
        from vlm_dagster.loaders.kjt import to_kjt

        return to_kjt(self, list(self.values) if traits is None else traits, unique=unique)


def _size(values: Mapping[str, Tensor]) -> int | None:
    """N, which all traits agree on; None if there is no trait."""
    sizes = {name: len(tensor) for name, tensor in values.items()}
    if len(set(sizes.values())) > 1:
        raise SchemaError(
            f"traits of one sequence differ in length: {sizes}", "Give each a value an event."
        )
    return next(iter(sizes.values()), None)
