"""Parts of a file, kept until it is known where they go: in memory, and beyond a limit on disk."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa

__all__ = ["Spool"]

K = TypeVar("K", bound=Hashable)


class Spool(Generic[K]):
    """Batches by key, in the order in which they came.

    Args:
        scratch: where to spill; files there begin with `name`.
        limit: bytes to hold in memory before everything held is spilled.
    """

    def __init__(self, scratch: Path, name: str, schema: pa.Schema, limit: int) -> None:
        self._scratch = scratch
        self._name = name
        self._schema = schema
        self._limit = limit
        self._held: dict[K, list[pa.RecordBatch]] = {}
        self._num_held = 0
        # With the file itself: a writer closes no sink that it opened by itself.
        self._spilled: dict[K, tuple[Path, Any, pa.ipc.RecordBatchStreamWriter]] = {}

    def keys(self) -> set[K]:
        return {*self._held, *self._spilled}

    def add(self, key: K, batch: pa.RecordBatch, num_bytes: int) -> None:
        self._held.setdefault(key, []).append(batch)
        self._num_held += num_bytes
        if self._num_held > self._limit:
            self._spill()

    def _spill(self) -> None:
        for key, batches in self._held.items():
            if key not in self._spilled:
                path = self._scratch / f"{self._name}.{len(self._spilled)}.arrow"
                sink = pa.OSFile(str(path), "wb")
                self._spilled[key] = (path, sink, pa.ipc.new_stream(sink, self._schema))
            for batch in batches:
                self._spilled[key][2].write_batch(batch)
        self._held, self._num_held = {}, 0

    def take(self, key: K) -> Iterator[pa.RecordBatch]:
        """The batches of a key, which are forgotten then. Nothing may be added any more."""
        if key in self._spilled:
            path, sink, writer = self._spilled.pop(key)
            with sink:
                writer.close()
            with pa.memory_map(str(path)) as source:
                yield from pa.ipc.open_stream(source)
            path.unlink()
        yield from self._held.pop(key, [])

    def close(self) -> None:
        """Let go of everything that was not taken."""
        for path, sink, writer in self._spilled.values():
            with sink:
                writer.close()
            path.unlink(missing_ok=True)
        self._spilled, self._held = {}, {}
