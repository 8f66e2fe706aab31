"""The batch forms, made of ranges of arenas: which events are copied where.

Plain functions. A batch is a list of pieces, (arena, rows): rows [R] of the arena's examples, in
order. What they return owns its memory, whatever happens to the arenas.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from vlm_dagster.history import ArenaBuffers
from vlm_dagster.loaders.jagged import JaggedSequence
from vlm_dagster.loaders.materialize import Arena
from vlm_dagster.loaders.options import Form
from vlm_dagster.sealed.gathering import Placement, gather

__all__ = ["Piece", "form_sequences"]

I64 = npt.NDArray[np.int64]
Piece = tuple[Arena, I64]


def form_sequences(
    form: Form,
    pieces: Sequence[Piece],
    traits: Sequence[str],
    buffers: ArenaBuffers,
    *,
    num_padding: int = 0,
) -> JaggedSequence:
    """The sequences of a batch in one form.

    Args:
        pieces: whose sequences, in order; at least one, though it may have no rows, because their
            arenas say what types the traits have.
        traits: to copy. Booleans, integers, floats and times; no strings.
        buffers: memory for the values; it comes back when the tensors are dropped.
        num_padding: so many empty sequences follow.
    """
    make = {"deduplicated": _deduplicated, "expanded": _expanded, "views": _views}[form]
    return make(pieces, traits, buffers, num_padding)


def _expanded(
    pieces: Sequence[Piece], traits: Sequence[str], buffers: ArenaBuffers, num_padding: int
) -> JaggedSequence:
    """Every example's events, one example after another."""
    parts = [(arena, arena.starts[rows], arena.lengths[rows]) for arena, rows in pieces]
    lengths = np.concatenate([*(part[2] for part in parts), np.zeros(num_padding, np.int64)])
    return JaggedSequence.expanded(
        _copied(parts, _types(pieces, traits), buffers),
        _offsets(lengths),
        longest=_longest(lengths),
    )


def _views(
    pieces: Sequence[Piece], traits: Sequence[str], buffers: ArenaBuffers, num_padding: int
) -> JaggedSequence:
    """The events that any example sees, once each; examples share them."""
    asked = _Asked.of(pieces, num_padding)
    some = np.flatnonzero(asked.lengths)
    order = some[asked.places[some].argsort(kind="stable")]
    begins = asked.places[order]
    # Up to where the ranges so far reach: one that begins beyond that begins a stretch. (Those of
    # other arenas always do, see _Asked.)
    ends = np.maximum.accumulate(begins + asked.lengths[order])
    is_first = np.ones(len(order), bool)
    np.greater(begins[1:], ends[:-1], out=is_first[1:])
    first = np.flatnonzero(is_first)
    begin = begins[first]
    counts = ends[np.append(first[1:], len(order)) - 1] - begin if len(order) else begin
    moved = np.cumsum(counts) - counts - begin
    starts = np.zeros(len(asked.lengths), np.int64)
    starts[order] = begins + moved[np.cumsum(is_first) - 1]
    return JaggedSequence.views(
        _copied(list(asked.parts(begin, counts)), _types(pieces, traits), buffers),
        torch.from_numpy(starts),
        torch.from_numpy(asked.lengths),
        num_events=int(asked.lengths.sum()),
        longest=_longest(asked.lengths),
    )


def _deduplicated(
    pieces: Sequence[Piece], traits: Sequence[str], buffers: ArenaBuffers, num_padding: int
) -> JaggedSequence:
    """Each distinct range of events once. Two examples that see the same range of one arena share it;
    the values are not compared."""
    asked = _Asked.of(pieces, num_padding)
    places = np.where(asked.lengths > 0, asked.places, -1)  # all empty ones are one
    order = np.lexsort((asked.lengths, places))
    place, length = places[order], asked.lengths[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = (place[1:] != place[:-1]) | (length[1:] != length[:-1])
    inverse = np.empty(len(order), np.int64)
    inverse[order] = np.cumsum(is_first) - 1
    begin, counts = place[is_first], length[is_first]
    return JaggedSequence.deduplicated(
        _copied(list(asked.parts(begin, counts)), _types(pieces, traits), buffers),
        _offsets(counts),
        torch.from_numpy(inverse),
        num_events=int(asked.lengths.sum()),
        longest=_longest(counts),
    )


@dataclass(frozen=True)
class _Asked:
    """The ranges of a batch, at places that tell the arenas apart.

    Attributes:
        arenas: each once.
        bases: [A + 1] the place of each arena's first event. Between an arena's last one and the
            next arena's first one lies a place that is nobody's, so that their ranges never adjoin.
        places, lengths: [B] example b sees `[places[b], places[b] + lengths[b])`.
    """

    arenas: list[Arena]
    bases: I64
    places: I64
    lengths: I64

    @classmethod
    def of(cls, pieces: Sequence[Piece], num_padding: int) -> _Asked:
        # By identity: an arena may come in several pieces.
        arenas = list({id(arena): arena for arena, _ in pieces}.values())
        sizes = [len(next(iter(arena.columns.values()), ())) for arena in arenas]
        bases = np.cumsum([0, *(size + 1 for size in sizes)])
        base_of = {id(arena): base for arena, base in zip(arenas, bases.tolist(), strict=False)}
        padding = np.zeros(num_padding, np.int64)
        places = [arena.starts[rows] + base_of[id(arena)] for arena, rows in pieces]
        lengths = [arena.lengths[rows] for arena, rows in pieces]
        return cls(
            arenas, bases, np.concatenate([*places, padding]), np.concatenate([*lengths, padding])
        )

    def parts(self, begin: I64, counts: I64) -> Iterator[tuple[Arena, I64, I64]]:
        """Ranges of places, which have to come in order, as ranges of each arena."""
        cuts = np.searchsorted(begin, self.bases).tolist()
        for arena, base, low, high in zip(
            self.arenas, self.bases.tolist(), cuts, cuts[1:], strict=False
        ):
            yield arena, begin[low:high] - base, counts[low:high]


def _copied(
    parts: Sequence[tuple[Arena, I64, I64]],
    traits: Mapping[str, pa.DataType],
    buffers: ArenaBuffers,
) -> dict[str, Tensor]:
    """Ranges (starts, counts) of arenas, one after another.

    `Placement` keeps the interpreter's lock while it copies long ranges. What lets go of it for every
    range has to get it back from the threads that decode, which takes longer than the copies.
    """
    asked = []
    for arena, starts, counts in parts:
        some = counts > 0
        if some.any():
            asked.append((arena, starts[some], counts[some]))
    ends = np.cumsum([0, *(int(counts.sum()) for _, _, counts in asked)]).tolist()
    placements = [
        Placement(starts, counts, np.cumsum(counts) - counts) for _, starts, counts in asked
    ]
    found = {}
    for name, kind in traits.items():
        assert not pa.types.is_string(kind), "strings are no tensor"
        destination = buffers.empty(ends[-1], _word(kind))
        for (arena, starts, counts), placement, begin, end in zip(
            asked, placements, ends, ends[1:], strict=False
        ):
            values, goal = arena.columns[name], destination[begin:end]
            if pa.types.is_boolean(kind):  # eight to a byte there, one here
                goal[:] = gather(values, starts, counts).to_numpy(zero_copy_only=False)
            else:
                placement.copy(values, goal)
        # This array itself and not a slice of it, because its end is what brings the memory back.
        found[name] = torch.from_numpy(destination)
    return found


def _types(pieces: Sequence[Piece], traits: Sequence[str]) -> dict[str, pa.DataType]:
    arena, _ = pieces[0]
    return {name: arena.columns[name].type for name in traits}


def _word(kind: pa.DataType) -> npt.DTypeLike:
    """What a value is in a tensor. Times are int64 microseconds."""
    if pa.types.is_boolean(kind):
        return np.bool_
    return f"{'f' if pa.types.is_floating(kind) else 'i'}{kind.bit_width // 8}"


def _offsets(lengths: I64) -> Tensor:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return torch.from_numpy(offsets)


def _longest(lengths: I64) -> int:
    return int(lengths.max()) if len(lengths) else 0
