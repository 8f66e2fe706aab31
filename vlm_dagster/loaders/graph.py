"""The torchdata graph of one epoch: chunks -> read in parallel -> cut into batches -> prefetch.

This is the only module that knows torchdata. Where an epoch stands is arithmetic on its plan, so
the nodes hold no state of their own: a resumed epoch is a new graph that begins elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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


Form = Callable[[Sequence[tuple[ChunkData, I64]]], Batch]
"""Forms a batch of some rows of some chunks."""


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
        form: Form,
    ) -> None:
        super().__init__()
        self._source: BaseNode[ChunkData | Failure] | None = source
        self._batch_size = batch_size
        self._skip = skip
        self._form = form
        self._batches: Iterator[Batch | Failure] = iter(())

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        assert self._source is not None, "a graph is gone over once"
        self._source.reset()
        self._batches = _cut(self._source, self._batch_size, self._skip, self._form)

    def next(self) -> Batch | Failure:
        try:
            return next(self._batches)
        except StopIteration:
            # torchdata keeps this exception, and so this node, in a cycle of its own; what must not
            # wait for the garbage collector is the source with its threads.
            self._source = None
            raise

    def get_state(self) -> dict[str, Any]:
        return {}


def _cut(
    source: Iterable[ChunkData | Failure], batch_size: int, skip: int, form: Form
) -> Iterator[Batch | Failure]:
    # Not a method: a generator that held its node would be a cycle, and a graph that is dropped
    # would keep its threads until the garbage collector comes by.
    parts: list[tuple[ChunkData, I64]] = []
    missing = batch_size
    for chunk in source:
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
                yield _formed(form, parts)
                parts, missing = [], batch_size
    if parts:
        yield _formed(form, parts)


def _formed(form: Form, parts: Sequence[tuple[ChunkData, I64]]) -> Batch | Failure:
    try:
        return form(parts)
    except Exception as error:
        return Failure(error)


def epoch_graph(
    chunks: Sequence[Chunk],
    read: Callable[[Chunk], ChunkData],
    form: Form,
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
    try:
        for item in node:
            if isinstance(item, Failure):
                raise item.error
            yield item
    finally:
        del node  # whoever keeps the error keeps this frame, which must not keep the threads
