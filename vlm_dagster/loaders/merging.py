"""Several groups' sequences as one, in the order of time, for models that want a single sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_dagster.errors import SchemaError
from vlm_dagster.loaders.fills import check_fill, check_length
from vlm_dagster.loaders.jagged import JaggedSequence

__all__ = ["merge"]


def merge(
    sequences: Mapping[str, JaggedSequence],
    *,
    by: str,
    traits: Sequence[str] | None = None,
    fill: Mapping[str, float] | None = None,
    max_length: int | None = None,
    group_column: str = "group",
) -> JaggedSequence:
    """See `Batch.merged`; `sequences` are the groups, in order."""
    check_length(max_length)
    names = _traits(sequences, by, traits, fill or {}, group_column)
    groups = [
        sequence.expand([name for name in names if name in sequence.values])
        for sequence in sequences.values()
    ]
    order, lengths = _order(groups, by), sum(group.lengths for group in groups)
    assert isinstance(lengths, Tensor)
    longest = None
    if max_length is not None and max_length < sum(group.longest for group in groups):
        order, lengths, longest = _newest(order, lengths, max_length)
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    values = {name: _column(groups, name, fill or {})[order] for name in names}
    values[group_column] = _numbers(groups)[order]
    return JaggedSequence.expanded(values, offsets, longest=longest)


def _traits(
    sequences: Mapping[str, JaggedSequence],
    by: str,
    traits: Sequence[str] | None,
    fill: Mapping[str, float],
    group_column: str,
) -> list[str]:
    """The columns of the merge: what is asked for, and the time it goes by."""
    if not sequences:
        raise SchemaError("a merge of no groups", "Name at least one.")
    for group, sequence in sequences.items():
        if by not in sequence.values:
            raise SchemaError(
                f"group {group!r} has no {by!r} to merge by",
                f"Add it to the projection of {group!r}, or merge by another time.",
            )
    if traits is None:
        every = [set(sequence.values) for sequence in sequences.values()]
        known = dict.fromkeys(name for s in sequences.values() for name in s.values)
        traits = [n for n in known if n in fill or all(n in names for names in every)]
    names = list(dict.fromkeys([*traits, by]))
    for name in names:
        kinds: dict[str, torch.dtype] = {}
        for group, sequence in sequences.items():
            if name in sequence.values:
                kinds[group] = sequence.values[name].dtype
            elif name not in fill:
                raise SchemaError(
                    f"group {group!r} has no trait {name!r}",
                    f"Say what stands in its place, fill={{{name!r}: ...}}, or leave the trait out.",
                )
        if not kinds:
            raise SchemaError(f"no group has a trait {name!r}", "Leave it out.")
        if len(kinds) < len(sequences):
            check_fill(name, next(iter(kinds.values())), fill[name])
        if len(set(kinds.values())) > 1:
            raise SchemaError(
                f"trait {name!r} has different types: {kinds}",
                "Give it one type in both groups, or another name in one of them.",
            )
    if group_column in names:
        raise SchemaError(
            f"a trait is called {group_column!r}, like the column of group numbers",
            "Name that column otherwise: group_column=...",
        )
    return names


def _order(groups: Sequence[JaggedSequence], by: str) -> Tensor:
    """[N] the events of all groups by example, then time, then group, then position."""
    example = torch.cat([_examples(group.lengths, group.num_events) for group in groups])
    # Stable sorts keep what they find in order: group after group, each by example and position.
    by_time = torch.cat([group.values[by] for group in groups]).argsort(stable=True)
    return by_time[example[by_time].argsort(stable=True)]


def _examples(lengths: Tensor, num_events: int) -> Tensor:
    """[sum(lengths)] whose each event is."""
    numbers = torch.arange(len(lengths), device=lengths.device)
    return numbers.repeat_interleave(lengths, output_size=num_events)


def _newest(order: Tensor, lengths: Tensor, max_length: int) -> tuple[Tensor, Tensor, int]:
    """The newest events of each example: their order, lengths, and the longest of these. The one
    place that waits for a GPU, because the host has to know how many stay."""
    kept = lengths.clamp(max=max_length)
    first = (lengths.cumsum(0) - kept)[_examples(lengths, len(order))]
    stays = torch.arange(len(order), device=order.device) >= first
    return order[stays], kept, int(kept.max()) if len(kept) else 0


def _column(groups: Sequence[JaggedSequence], name: str, fill: Mapping[str, float]) -> Tensor:
    like = next(group.values[name] for group in groups if name in group.values)
    return torch.cat(
        [
            group.values[name]
            if name in group.values
            else like.new_full((group.num_events,), fill[name])
            for group in groups
        ]
    )


def _numbers(groups: Sequence[JaggedSequence]) -> Tensor:
    kind = torch.int8 if len(groups) <= torch.iinfo(torch.int8).max else torch.int64
    return torch.cat(
        [
            torch.full((group.num_events,), number, dtype=kind, device=group.lengths.device)
            for number, group in enumerate(groups)
        ]
    )
