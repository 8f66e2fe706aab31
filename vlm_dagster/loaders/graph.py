"""The torchdata graph of one epoch: chunks -> read in parallel -> cut into batches -> prefetch.

This is the only module that knows torchdata. Where an epoch stands is arithmetic on its plan, so
the nodes hold no state of their own: a resumed epoch is a new graph that begins elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torchdata.nodes import BaseNode, IterableWrapper, ParallelMapper, PinMemory, Prefetcher

from vlm_dagster.loaders.batch import Batch
from vlm_dagster.loaders.plan import Chunk

__all__ = ["ChunkData", "Failure", "epoch_graph", "run"]

I64 = npt.NDArray[np.int64]


class ChunkData:
    """A chunk in memory: anything that knows its size and can form a batch of parts."""

    num_examples: int


@dataclass(frozen=True)
class Failure:
    """An error on its way to the consumer. torchdata would rebuild it from its text alone."""

    error: BaseException


@dataclass(frozen=True)
class _Read:
    """The map function of the parallel stage; errors travel as values."""

    read: Callable[[Chunk], ChunkData]

    def __call__(self, chunk: Chunk) -> ChunkData | Failure:
        try:
            return self.read(chunk)
        except Exception as error:
            return Failure(error)


class Rebatch(BaseNode[Batch | Failure]):  # type: ignore[misc]
    """Cuts the chunks' examples, in order, into batches of a fixed size; the last may be smaller."""

    def __init__(
        self,
        source: BaseNode[ChunkData | Failure],
        batch_size: int,
        skip: int,
        form: Callable[[Sequence[tuple[ChunkData, I64]]], Batch],
    ) -> None:
        super().__init__()
        self._source = source
        self._batch_size = batch_size
        self._skip = skip
        self._form = form
        self._batches: Iterator[Batch | Failure] = iter(())

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self._source.reset()
        self._batches = self._cut()

    def next(self) -> Batch | Failure:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        return {}

    def _cut(self) -> Iterator[Batch | Failure]:
        parts: list[tuple[ChunkData, I64]] = []
        missing = self._batch_size
        skip = self._skip
        for chunk in self._source:
            if isinstance(chunk, Failure):
                yield chunk
                return
            at, skip = skip, 0
            while at < chunk.num_examples:
                end = min(at + missing, chunk.num_examples)
                parts.append((chunk, np.arange(at, end)))
                missing -= end - at
                at = end
                if missing == 0:
                    yield self._formed(parts)
                    parts, missing = [], self._batch_size
        if parts:
            yield self._formed(parts)

    def _formed(self, parts: Sequence[tuple[ChunkData, I64]]) -> Batch | Failure:
        try:
            return self._form(parts)
        except Exception as error:
            return Failure(error)


def epoch_graph(
    chunks: Sequence[Chunk],
    read: Callable[[Chunk], ChunkData],
    form: Callable[[Sequence[tuple[ChunkData, I64]]], Batch],
    *,
    batch_size: int,
    skip: int,
    num_workers: int,
    prefetch: int,
    pin_memory: bool,
) -> BaseNode[Batch | Failure]:
    """The graph of (the rest of) an epoch.

    Args:
        chunks: in order; the first `skip` examples of the first one are passed over.
        num_workers: threads that read and decode; 0 reads in the consumer's own thread.
        prefetch: batches ready ahead of the consumer; 0 for none.
    """
    node: BaseNode[Any] = IterableWrapper(chunks)
    node = ParallelMapper(node, _Read(read), num_workers=num_workers, method="thread")
    node = Rebatch(node, batch_size, skip, form)
    if pin_memory:
        node = PinMemory(node)
    if prefetch:
        node = Prefetcher(node, prefetch)
    return node


def run(node: BaseNode[Batch | Failure]) -> Iterator[Batch]:
    """Go over a graph once; errors come out as they were raised."""
    node.reset()
    for item in node:
        if isinstance(item, Failure):
            raise item.error
        yield item
