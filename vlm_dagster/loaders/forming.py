"""Forming a batch: the examples at some places of a chunk, with their sequences copied out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch.utils.dlpack import from_dlpack

from vlm_dagster.loaders.batch import Batch, JaggedSequence
from vlm_dagster.loaders.graph import ChunkData
from vlm_dagster.loaders.materialize import UnitData

__all__ = ["BatchFormer", "UnitsInMemory"]

I64 = npt.NDArray[np.int64]


class UnitsInMemory(ChunkData):
    """A chunk: units in memory, and the order in which their examples come."""

    def __init__(self, units: Sequence[UnitData], order: I64) -> None:
        self._units = units
        self._order = order
        self._bases = np.cumsum([0, *(unit.num_examples for unit in units)])
        self.num_examples = len(order)

    def pieces(self, rows: I64) -> list[tuple[UnitData, I64]]:
        """The examples at these places of the order, as rows of their units. Within a batch,
        examples of one unit stand together: a batch is a set, and this gathers each unit once."""
        chosen = self._order[rows]
        of_unit = np.searchsorted(self._bases, chosen, side="right") - 1
        return [(self._units[i], chosen[of_unit == i] - self._bases[i]) for i in np.unique(of_unit)]


class BatchFormer:
    """Forms expanded batches: every example with a copy of its own sequences.

    Args:
        columns: of the examples.
        traits: to copy, per feature group.
    """

    def __init__(self, columns: Sequence[str], traits: Mapping[str, Sequence[str]]) -> None:
        self._columns = list(columns)
        self._traits = {group: list(names) for group, names in traits.items()}

    def __call__(self, parts: Sequence[tuple[ChunkData, I64]]) -> Batch:
        """The batch of these rows of these chunks, chunk by chunk."""
        pieces: list[tuple[UnitData, I64]] = []
        for chunk, rows in parts:
            assert isinstance(chunk, UnitsInMemory)
            pieces.extend(chunk.pieces(rows))
        examples: dict[str, torch.Tensor] = {}
        strings: dict[str, list[str]] = {}
        for name in self._columns:
            column = pa.concat_arrays([unit.examples[name].take(pa.array(r)) for unit, r in pieces])
            if pa.types.is_string(column.type):
                strings[name] = column.to_pylist()
            else:
                examples[name] = _tensor([column])
        sequences = {}
        for group, traits in self._traits.items():
            gathered = [unit.arenas[group].sequences(rows) for unit, rows in pieces]
            lengths = np.concatenate([lengths for _, lengths in gathered])
            values = {
                name: _tensor([columns[name] for columns, _ in gathered], own=True)
                for name in traits
            }
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            sequences[group] = JaggedSequence.expanded(values, torch.from_numpy(offsets))
        return Batch(examples, sequences, strings)


def _tensor(arrays: Sequence[pa.Array], *, own: bool = False) -> torch.Tensor:
    """One tensor of some arrays, one after another.

    Args:
        own: nobody else holds the memory of a single array, so that it can be taken over uncopied.
    """
    parts = [a.cast(pa.int64()) if pa.types.is_timestamp(a.type) else a for a in arrays]
    if len(parts) == 1 and own and not pa.types.is_boolean(parts[0].type) and len(parts[0]):
        taken: torch.Tensor = from_dlpack(parts[0])
        return taken
    values = [part.to_numpy(zero_copy_only=False) for part in parts]
    whole = values[0] if len(values) == 1 else np.concatenate(values)
    # Arrow's memory is read-only and shared; a tensor's has to be its own.
    return torch.from_numpy(whole if whole.flags.writeable else whole.copy())
