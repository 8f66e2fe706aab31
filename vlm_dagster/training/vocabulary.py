"""Which items a model knows: item id to vocabulary index, built from training events only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm_dagster.errors import SchemaError

__all__ = ["Vocabulary", "build_vocabulary"]


class Vocabulary:
    """Items by falling frequency, then rising id, at indices 1, 2, ...; 0 is any other item.

    Attributes:
        ids: int64 [V - 1]; ids[i] has index i + 1.
        counts: int64 [V]; how often each index occurred in training. counts[0] is what was cut
            off by `min_count` or `max_size`.
    """

    def __init__(self, ids: Tensor, counts: Tensor) -> None:
        if ids.dtype != torch.int64 or counts.dtype != torch.int64:
            raise SchemaError(
                f"a vocabulary of {ids.dtype} ids and {counts.dtype} counts", "Both are int64."
            )
        if counts.numel() != ids.numel() + 1:
            raise SchemaError(
                f"a vocabulary of {ids.numel()} ids has {counts.numel()} counts",
                "It has one count for each id, and one for index 0.",
            )
        self.ids = ids
        self.counts = counts
        self._sorted, order = ids.sort()
        self._index = order + 1
        if ids.numel() and bool((self._sorted.diff() == 0).any()):
            raise SchemaError("a vocabulary holds an id twice", "Every id has one index.")

    @property
    def size(self) -> int:
        """V: the number of indices, the 0 for unknown items included."""
        return self.counts.numel()

    def lookup(self, item_ids: Tensor) -> Tensor:
        """int64 [...] vocabulary index of each integer id; 0 where it is unknown."""
        if item_ids.is_floating_point() or item_ids.dtype == torch.bool:
            raise SchemaError(
                f"item ids are {item_ids.dtype}", "Declare the item trait as an integer type."
            )
        wanted = item_ids.to(torch.int64)
        if not self.ids.numel():
            return torch.zeros_like(wanted)
        place = torch.searchsorted(self._sorted, wanted).clamp(max=self.ids.numel() - 1)
        return torch.where(self._sorted[place] == wanted, self._index[place], 0)

    def to(self, device: torch.device | str) -> Self:
        """The same vocabulary with its tables on `device`."""
        return type(self)(self.ids.to(device), self.counts.to(device))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vocabulary):
            return NotImplemented
        return torch.equal(self.ids, other.ids) and torch.equal(self.counts, other.counts)

    __hash__ = None  # type: ignore[assignment]


def _to_numpy(chunk: Any) -> NDArray[np.int64]:
    if isinstance(chunk, (pa.Array, pa.ChunkedArray)):
        if chunk.null_count:
            raise SchemaError(
                f"{chunk.null_count} item ids are null", "Give the item trait a `missing` value."
            )
        if not pa.types.is_integer(chunk.type):
            raise SchemaError(f"item ids are {chunk.type}", "Declare the item trait as an integer.")
        chunk = (
            chunk.to_numpy(zero_copy_only=False)
            if isinstance(chunk, pa.Array)
            else chunk.to_numpy()
        )
    if not np.issubdtype(chunk.dtype, np.integer):
        raise SchemaError(f"item ids are {chunk.dtype}", "Declare the item trait as an integer.")
    return np.asarray(chunk, dtype=np.int64)


def _merge(
    parts: list[tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    ids = np.concatenate([part[0] for part in parts])
    counts = np.concatenate([part[1] for part in parts])
    unique, inverse = np.unique(ids, return_inverse=True)
    total = np.zeros(len(unique), dtype=np.int64)
    np.add.at(total, inverse, counts)
    return unique, total


def build_vocabulary(
    chunks: Iterable[Any], *, min_count: int = 1, max_size: int | None = None
) -> Vocabulary:
    """Count item ids and keep the frequent ones. Memory grows with distinct items, not events.

    Args:
        chunks: integer numpy arrays or Arrow arrays of item ids, in any order and of any size.
        min_count: items seen fewer times are unknown (index 0).
        max_size: at most so many items, the most frequent; None keeps all.

    Raises:
        SchemaError: ids that are not integers, nulls, or a bad limit.
    """
    if min_count < 1:
        raise SchemaError(f"min_count={min_count} is not a count", "Use 1 or more.")
    if max_size is not None and max_size < 1:
        raise SchemaError(f"max_size={max_size} is not a size", "Use 1 or more, or None for all.")
    empty = np.zeros(0, dtype=np.int64)
    parts = [(empty, empty)]
    pending = 0
    for chunk in chunks:
        found = np.unique(_to_numpy(chunk), return_counts=True)
        parts.append((found[0], found[1].astype(np.int64)))
        pending += len(found[0])
        # Merging only when the backlog outgrows the result keeps the total work near linear.
        if pending > max(len(parts[0][0]), 1 << 20):
            parts, pending = [_merge(parts)], 0
    ids, counts = _merge(parts)
    order = np.lexsort((ids, -counts))
    keep = order[counts[order] >= min_count][:max_size]
    rest = counts.sum() - counts[keep].sum()
    return Vocabulary(
        torch.from_numpy(ids[keep]),
        torch.from_numpy(np.concatenate([[rest], counts[keep]]).astype(np.int64)),
    )
