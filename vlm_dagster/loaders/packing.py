"""A unit as one run of bytes: how it lies in a cache's file, and how it comes from another process.

Arrow IPC streams, one after another: the examples, with where each one's sequences lie as further
columns, then the events of each group. Reading it back copies nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vlm_dagster.loaders.materialize import Arena, UnitData

__all__ = ["PackedUnit", "unpack"]

_GROUP = b"vlm.group"
_GROUPS = b"vlm.groups"


class PackedUnit:
    """A unit about to be written, but for what is wrong with it.

    Attributes:
        num_bytes: what it takes, a multiple of 8.
    """

    def __init__(self, unit: UnitData) -> None:
        placed = [v for arena in unit.arenas.values() for v in (arena.starts, arena.lengths)]
        numbered = [
            f"{part} {i}" for i in range(len(unit.arenas)) for part in ("starts", "lengths")
        ]
        count = {_GROUPS: str(len(unit.arenas)).encode()}
        columns = [*unit.examples.values(), *(pa.array(values) for values in placed)]
        self._batches = [_batch([*unit.examples, *numbered], columns, count)]
        for group, arena in unit.arenas.items():
            names, values = list(arena.columns), list(arena.columns.values())
            self._batches.append(_batch(names, values, {_GROUP: group.encode()}))
        counting = pa.MockOutputStream()
        self._write(counting)
        self.num_bytes = int(counting.size())

    def write(self, memory: npt.NDArray[np.uint8]) -> None:
        """Into the first `num_bytes` of some memory."""
        sink = pa.FixedSizeBufferWriter(pa.py_buffer(memory))
        self._write(sink)
        sink.close()

    def _write(self, sink: Any) -> None:
        for batch in self._batches:
            with pa.ipc.new_stream(sink, batch.schema) as stream:
                stream.write_batch(batch)


def _batch(names: list[str], columns: list[pa.Array], facts: dict[bytes, bytes]) -> pa.RecordBatch:
    fields = [pa.field(name, c.type) for name, c in zip(names, columns, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields, metadata=facts))


def unpack(memory: pa.Buffer) -> UnitData:
    """The unit that was written; its arrays lie in that memory and keep it.

    Raises:
        pa.ArrowInvalid, ValueError: it holds something else.
    """
    source = pa.BufferReader(memory)
    first = _read(source)
    num_groups = int(first.schema.metadata[_GROUPS])
    num_columns = first.num_columns - 2 * num_groups
    arenas = {}
    for i in range(num_groups):
        events = _read(source)
        starts, lengths = (first.column(num_columns + 2 * i + part) for part in (0, 1))
        arenas[events.schema.metadata[_GROUP].decode()] = Arena(
            dict(zip(events.schema.names, events.columns, strict=True)),
            np.asarray(starts),
            np.asarray(lengths),
        )
    names = first.schema.names[:num_columns]
    return UnitData(dict(zip(names, first.columns[:num_columns], strict=True)), arenas)


def _read(source: Any) -> pa.RecordBatch:
    stream = pa.ipc.open_stream(source)
    batch = stream.read_next_batch()
    for _ in stream:  # the mark of its end, so that the next one begins
        raise ValueError("a unit has one batch of each kind")
    return batch
