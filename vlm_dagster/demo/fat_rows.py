"""What fat rows would have stored: measured on a sample of the examples, scaled to all of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlm_dagster.history import Snapshot
from vlm_dagster.loaders.materialize import UnitData, materialize
from vlm_dagster.loaders.plan import make_plan
from vlm_dagster.pointers import PointerSnapshot
from vlm_dagster.pointers.spec import pointer_fields
from vlm_dagster.schema import Projection

__all__ = ["FatRows", "estimate_fat_rows"]

_ROWS_PER_GROUP = 256


@dataclass(frozen=True)
class FatRows:
    """Bytes that the same examples would take with their histories copied in.

    Attributes:
        by_time: as usually written, in order of time, snappy.
        by_user: clustered by user, zstd: the honest opponent.
        num_copied_events: events in all histories of all examples, copies counted.
        num_sampled: examples that the bytes were measured on.
    """

    by_time: int
    by_user: int
    num_copied_events: int
    num_sampled: int


def estimate_fat_rows(
    pointers: PointerSnapshot, history: Snapshot, *, max_examples: int = 8192
) -> FatRows:
    """Write a sample of the examples as fat rows, in memory, and scale by the events copied.

    Args:
        history: the snapshot of the only group that the pointers point into.
        max_examples: the sample's size, about; whole units of users from all over the data.
    """
    group = history.group.name
    lengths = pointers.to_table([pointer_fields(group)["length"]]).column(0)
    copied = int(pc.sum(lengths).as_py() or 0)
    traits = ["event_id", "event_time", *(t.name for t in history.group.traits)]
    projections = {group: Projection(traits)}
    histories = {group: history}
    plan = make_plan(
        pointers,
        histories,
        projections,
        examples_per_unit=512,
        events_per_unit=500_000,
        verify=False,
        drop_gone=True,
    )
    count = max(1, max_examples // 512)
    step = max(1, len(plan.units) // count)
    by_time = by_user = sampled = sampled_events = 0
    columns = ["user_id", "request_id", "request_time", *(t.name for t in pointers.spec.columns)]
    for unit in plan.units[::step][:count]:
        users = plan.users_of(unit)
        data = materialize(
            pointers,
            histories,
            projections,
            unit.bucket,
            users,
            columns=columns,
            verify=False,
        )
        order = np.argsort(data.examples["request_time"].cast(pa.int64()).to_numpy(), kind="stable")
        by_user += _written(data, group, np.arange(data.num_examples), "zstd")
        by_time += _written(data, group, order, "snappy")
        sampled += data.num_examples
        sampled_events += int(data.arenas[group].lengths.sum())
    scale = copied / sampled_events if sampled_events else 0.0
    return FatRows(round(by_time * scale), round(by_user * scale), copied, sampled)


def _written(data: UnitData, group: str, rows: npt.NDArray[np.int64], compression: str) -> int:
    sink = pa.BufferOutputStream()
    writer: pq.ParquetWriter | None = None
    for start in range(0, len(rows), _ROWS_PER_GROUP):
        part = rows[start : start + _ROWS_PER_GROUP]
        columns = {name: values.take(pa.array(part)) for name, values in data.examples.items()}
        sequences, lengths = data.arenas[group].sequences(part)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        for name, values in sequences.items():
            columns[f"history_{name}"] = pa.ListArray.from_arrays(offsets, values)
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(sink, table.schema, compression=compression)
        writer.write_table(table)
    if writer is not None:
        writer.close()
    return int(sink.tell())
