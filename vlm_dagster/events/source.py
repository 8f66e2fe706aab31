"""What every source of events offers, whatever format it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vlm_dagster.errors import SchemaError
from vlm_dagster.hashing import id_words, mix64
from vlm_dagster.schema import FeatureGroup

__all__ = [
    "BinaryLabel",
    "CheckedRows",
    "EventSource",
    "OnCutLine",
    "Progress",
    "content_ids",
    "input_schema",
]

Progress = Callable[[int], None]
"""Called now and then with the number of input bytes (as stored, so compressed) read so far."""

OnCutLine = Literal["refuse", "drop"]
"""What happens to a last line that ends in the middle: an error, or dropped and counted."""

_CONTENT_SEED = np.uint64(0x9E3779B97F4A7C15)
_BLOCK_ROWS = 16_384  # all temporaries of a block stay in the L2 cache


class EventSource(Protocol):
    """A readable stream of one feature group's events.

    Attributes:
        group: what the events are; `batches` yields exactly `input_schema(group)`.
        label: how a binary label follows from an event, or None if the source has none.
        paths: the input files, in reading order; empty if the events are made up.
        num_bytes: input bytes in all, in the unit of `Progress` (an estimate for made-up events).
        num_dropped: lines dropped by the latest complete pass (see `OnCutLine`).
    """

    @property
    def group(self) -> FeatureGroup: ...
    @property
    def label(self) -> BinaryLabel | None: ...
    @property
    def paths(self) -> tuple[str, ...]: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def num_dropped(self) -> int: ...

    def options(self) -> dict[str, Any]:
        """Everything beside the files that decides which events come out, as JSON values."""
        ...

    def batches(self, progress: Progress | None = None) -> Iterator[pa.RecordBatch]:
        """All events in file order, from the beginning, in bounded memory.

        Raises:
            SourceFormatError: a file does not say what its format promises.
        """
        ...


class CheckedRows(Protocol):
    """Some rows of one input file that can say where they came from."""

    @property
    def path(self) -> str: ...
    @property
    def batch(self) -> pa.RecordBatch: ...
    def refuse_where(self, bad: pa.Array, column: str, problem: str, way_out: str) -> None:
        """SourceFormatError for the first row where `bad` is true, if there is one."""
        ...


@dataclass(frozen=True)
class BinaryLabel:
    """A label of 0 or 1 by a rule on one trait: 1 where `trait >= at_least`."""

    trait: str
    at_least: float

    def apply(self, rows: pa.Table | pa.RecordBatch) -> pa.Array:
        """The labels of these rows. [N] rows in, [N] int8 out.

        Raises:
            SchemaError: the rows lack the trait, or it holds nulls.
        """
        if self.trait not in rows.schema.names:
            raise SchemaError(
                f"the label is defined on trait {self.trait!r}, which these rows lack",
                f"Read that trait too; they have {', '.join(rows.schema.names)}.",
            )
        column = rows.column(self.trait)
        if column.null_count:
            raise SchemaError(
                f"trait {self.trait!r} holds {column.null_count:,} nulls, which have no label",
                "Label the sealed events: they hold no nulls.",
            )
        labels = pc.greater_equal(column.cast(pa.float64()), self.at_least).cast(pa.int8())
        return labels.combine_chunks() if isinstance(labels, pa.ChunkedArray) else labels

    def to_json(self) -> dict[str, Any]:
        return {"trait": self.trait, "at_least": self.at_least}


def input_schema(group: FeatureGroup) -> pa.Schema:
    """The columns of events not stored yet: `available_at` only where it is recorded, and nulls
    allowed, because refusing them is up to the store, which says in which row."""
    return pa.schema(
        [
            pa.field(field.name, field.type)
            for field in group.event_schema
            if field.name != "available_at" or group.availability == "recorded"
        ]
    )


def content_ids(columns: list[pa.Array]) -> pa.Array:
    """A 64-bit event id from everything that an event says. `columns`: [N] each; [N] int64 out.

    The same row gets the same id wherever it stands in whichever file, so exact repeats share
    one id and the store's `duplicates` policy sees them. Two different events of one user share
    one with a chance of 2^-64 a pair: about 1 in 7 billion for a history of 70,000.
    """
    num_rows = len(columns[0])
    filled = [_filled(column) for column in columns]
    ids = np.empty(num_rows, np.uint64)
    for start in range(0, num_rows, _BLOCK_ROWS):
        state: npt.NDArray[np.uint64] = np.full(
            min(_BLOCK_ROWS, num_rows - start), _CONTENT_SEED, np.uint64
        )
        for values, is_null in filled:
            words = id_words(values.slice(start, _BLOCK_ROWS))
            if is_null is not None:
                words = np.where(is_null[start : start + _BLOCK_ROWS], ~words, words)
            # Chained, so that equal values in two columns do not cancel out.
            state = mix64(state ^ words)
            state += _CONTENT_SEED
        ids[start : start + _BLOCK_ROWS] = state
    return pa.array(ids.view(np.int64))


def _filled(column: pa.Array) -> tuple[pa.Array, npt.NDArray[np.bool_] | None]:
    if column.null_count == 0:
        return column, None
    kind = column.type
    zero: Any = "" if pa.types.is_string(kind) else pa.scalar(0, pa.int64()).cast(kind)
    return column.fill_null(zero), column.is_null().to_numpy(zero_copy_only=False)
