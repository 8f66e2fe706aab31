"""Forming a batch of the rows that a step names: the examples' columns, and each group's sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from vlm_dagster.history import ArenaBuffers
from vlm_dagster.loaders.batch import Batch
from vlm_dagster.loaders.forms import form_sequences
from vlm_dagster.loaders.materialize import Arena, UnitData
from vlm_dagster.loaders.options import Form
from vlm_dagster.loaders.reading import Dropped

if TYPE_CHECKING:
    from vlm_dagster.loaders.graph import Ready

__all__ = ["BatchFormer", "empty_unit"]

I64 = npt.NDArray[np.int64]


def empty_unit(columns: pa.Schema, traits: Mapping[str, pa.Schema]) -> UnitData:
    """A unit without examples.

    Args:
        columns: of the examples.
        traits: per group, what is read of it.
    """
    none = np.zeros(0, np.int64)
    return UnitData(
        {field.name: pa.array([], field.type) for field in columns},
        {
            group: Arena({field.name: pa.array([], field.type) for field in schema}, none, none)
            for group, schema in traits.items()
        },
    )


class BatchFormer:
    """Forms batches.

    Args:
        form: of the sequences.
        columns: of the examples.
        traits: per group, what is read of it.
        buffers: memory that batches are formed in; it comes back when they are dropped.
        dropped: counts the examples that are missing.
    """

    def __init__(
        self,
        form: Form,
        columns: pa.Schema,
        traits: Mapping[str, pa.Schema],
        buffers: ArenaBuffers,
        dropped: Dropped,
    ) -> None:
        self._form = form
        self._dropped = dropped
        self._columns = columns
        self._traits = {group: schema.names for group, schema in traits.items()}
        self._buffers = buffers
        self._none = empty_unit(columns, traits)

    def __call__(self, ready: Ready) -> Batch:
        """The batch of a step, whose pools are in memory."""
        found: list[tuple[UnitData, I64]] = []
        pieces = ready.step.pieces
        for pool, first, end in zip(
            pieces.pool.tolist(), pieces.first.tolist(), pieces.end.tolist(), strict=True
        ):
            found.extend(ready.pools[pool].rows(first, end))
        missing = pieces.num_examples - sum(len(rows) for _, rows in found)
        if missing:
            self._dropped.count(missing)
        if not found:
            found.append((self._none, np.zeros(0, np.int64)))
        padding = ready.step.padding
        examples: dict[str, torch.Tensor] = {}
        strings: dict[str, list[str]] = {}
        for field in self._columns:
            name = field.name
            if pa.types.is_string(field.type):
                parts = [unit.examples[name].take(pa.array(rows)) for unit, rows in found]
                strings[name] = [*pa.chunked_array(parts).to_pylist(), *[""] * padding]
            else:
                # By numpy, which keeps the interpreter's lock for so little: getting it back from
                # threads that decode costs more than the copy.
                examples[name] = _tensor(
                    [unit.numbers[name][rows] for unit, rows in found], padding
                )
        sequences = {
            group: form_sequences(
                self._form,
                [(unit.arenas[group], rows) for unit, rows in found],
                traits,
                self._buffers,
                num_padding=padding,
            )
            for group, traits in self._traits.items()
        }
        return Batch(examples, sequences, strings, num_padding=padding)


def _tensor(parts: list[npt.NDArray[Any]], padding: int) -> torch.Tensor:
    """One tensor of some arrays of its own, one after another, and zeros after them."""
    if padding:
        parts.append(np.zeros(padding, parts[0].dtype))
    return torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))
