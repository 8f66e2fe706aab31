"""Events as users hand them over, made fit to be stored, or refused by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlm_dagster.errors import InvalidEventsError, SchemaError
from vlm_dagster.hashing import bucket_of
from vlm_dagster.schema import TIME_TYPE, FeatureGroup
from vlm_dagster.sealed.incoming import Column, Incoming, Rows
from vlm_dagster.windows import Window, WindowGrid, format_us

__all__ = ["incoming_events", "validated_events"]


def incoming_events(group: FeatureGroup) -> Incoming:
    """What the events of a group must look like when they come in."""
    columns = [
        Column("user_id", group.user_id),
        Column("event_id", group.event_id),
        Column("event_time", TIME_TYPE),
    ]
    if group.availability == "recorded":
        columns.append(Column("available_at", TIME_TYPE))
    columns += [Column(t.name, t.type, t.missing) for t in group.traits]
    return Incoming(
        "event",
        tuple(columns),
        extra_way_out="Drop it, or declare it as a trait of feature group "
        f"{group.name!r} (in a new table: traits are fixed when a table is created).",
    )


def validated_events(
    group: FeatureGroup,
    grid: WindowGrid,
    window: Window,
    num_buckets: int,
    events: Rows,
    progress: Callable[[int], None] | None = None,
) -> Iterator[pa.RecordBatch]:
    """The events of one window with the stored columns, plus `bucket` and `row`.

    Raises:
        SchemaError: a column is missing, undeclared, or of a type that would lose values.
        InvalidEventsError: a row has a null, a negative time, or lies outside the window.
    """
    incoming = incoming_events(group)
    recorded = group.availability == "recorded"
    clock = "available_at" if recorded else "event_time"
    names = group.stored_schema.names
    num_rows = 0
    for where, offset, batch in _explained(incoming, group, events):
        for name in {"event_time", clock}:
            times = batch.column(name).cast(pa.int64())
            incoming.refuse(
                where,
                offset,
                pc.less(times, 0),
                times,
                name,
                "is a time before 1970",
                "Check its unit and origin, or drop the row.",
            )
        _refuse_outside(incoming, where, offset, batch.column(clock), clock, grid, window)
        rows = np.arange(num_rows, num_rows + batch.num_rows, dtype=np.int64)
        buckets = bucket_of(batch.column("user_id"), num_buckets)
        num_rows += batch.num_rows
        yield (
            batch.select(names)
            .append_column("bucket", pa.array(buckets))
            .append_column("row", pa.array(rows))
        )
        if progress is not None:
            progress(batch.num_rows)


def _explained(
    incoming: Incoming, group: FeatureGroup, events: Rows
) -> Iterator[tuple[str, int, pa.RecordBatch]]:
    try:
        yield from incoming.batches(events)
    except SchemaError as error:
        if group.availability == "event_time" and "'available_at'" in str(error):
            raise SchemaError(
                f"the events have available_at, but feature group {group.name!r} was declared "
                "without it",
                "Declare the group with availability='recorded', or drop the column.",
            ) from None
        if group.availability == "recorded" and "'available_at' is missing" in str(error):
            raise SchemaError(
                f"the events have no available_at, which feature group {group.name!r} records",
                "Add the instant from which the platform could have served each event, or declare "
                "the group with availability='event_time' (in a new table).",
            ) from None
        raise


def _refuse_outside(
    incoming: Incoming,
    where: str,
    offset: int,
    column: pa.Array,
    clock: str,
    grid: WindowGrid,
    window: Window,
) -> None:
    times = column.cast(pa.int64())
    outside = pc.or_(pc.less(times, window.start_us), pc.greater_equal(times, window.end_us))
    first = pc.index(outside, True).as_py()
    if first < 0:
        return
    time_us = times[first].as_py()
    late = (
        ""
        if clock == "available_at"
        else " (if events arrive late, record when: declare availability='recorded')"
    )
    raise InvalidEventsError(
        f"lies outside window {window.key}, which is [{format_us(window.start_us)}, "
        f"{format_us(window.end_us)})",
        row=offset + first,
        column=clock,
        value=format_us(time_us),
        way_out=f"{grid.home_of(time_us)}{late}.",
        where=where,
        num_rows=pc.sum(outside.cast(pa.int64())).as_py(),
    )
