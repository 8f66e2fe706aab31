"""Requests as users hand them over, made fit to be resolved, or refused by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlm_dagster.errors import InvalidRequestsError, WatermarkError
from vlm_dagster.hashing import bucket_of
from vlm_dagster.history import Snapshot
from vlm_dagster.pointers.spec import PointerSpec
from vlm_dagster.schema import TIME_TYPE
from vlm_dagster.sealed.incoming import Column, Incoming, Rows
from vlm_dagster.windows import Window, WindowGrid, format_us

__all__ = ["incoming_requests", "validated_requests"]


def incoming_requests(spec: PointerSpec) -> Incoming:
    """What requests must look like when they come in."""
    columns = [Column("user_id", spec.user_id)]
    if spec.request == "event_id":
        columns.append(Column("event_id", spec.request_id))
    else:
        columns += [Column("request_id", spec.request_id), Column("request_time", TIME_TYPE)]
    columns += [Column(t.name, t.type, t.missing) for t in spec.columns]
    return Incoming(
        "request",
        tuple(columns),
        extra_way_out="Drop it, or declare it among the columns of pointer dataset "
        f"{spec.name!r} (in a new one: columns are fixed when it is created).",
        error=InvalidRequestsError,
    )


def validated_requests(
    spec: PointerSpec,
    grid: WindowGrid,
    window: Window,
    num_buckets: int,
    snapshots: Mapping[str, Snapshot],
    requests: Rows,
    progress: Callable[[int], None] | None = None,
) -> Iterator[pa.RecordBatch]:
    """The requests of one window, with `request_id`, plus `bucket` and `row`.

    Raises:
        SchemaError, InvalidRequestsError: they do not fit.
        WatermarkError: a request was made after the instant up to which a history is complete.
    """
    incoming = incoming_requests(spec)
    num_rows = 0
    for where, offset, batch in incoming.batches(requests):
        if spec.request == "request_time":
            times = batch.column("request_time").cast(pa.int64())
            _refuse_times(incoming, where, offset, times, grid, window)
            if len(times):
                newest = pc.max(times).as_py()
                check_watermarks(
                    snapshots, newest, f"a request made at {format_us(newest)} in {window.key}"
                )
        else:
            batch = batch.rename_columns(
                ["request_id" if n == "event_id" else n for n in batch.schema.names]
            )
        rows = np.arange(num_rows, num_rows + batch.num_rows, dtype=np.int64)
        num_rows += batch.num_rows
        yield (
            batch.select(spec.request_schema.names)
            .append_column("bucket", pa.array(bucket_of(batch.column("user_id"), num_buckets)))
            .append_column("row", pa.array(rows))
        )
        if progress is not None:
            progress(batch.num_rows)


def check_watermarks(snapshots: Mapping[str, Snapshot], time_us: int, asked: str) -> None:
    """WatermarkError unless every history is complete before this instant."""
    for snapshot in snapshots.values():
        if not snapshot.covers(time_us):
            raise WatermarkError(
                table=snapshot.uri,
                version=snapshot.version,
                watermark=snapshot.watermark or "(nothing sealed)",
                asked=asked,
            )


def _refuse_times(
    incoming: Incoming,
    where: str,
    offset: int,
    times: pa.Array,
    grid: WindowGrid,
    window: Window,
) -> None:
    outside = pc.or_(pc.less(times, window.start_us), pc.greater_equal(times, window.end_us))
    first = pc.index(outside, True).as_py()
    if first < 0:
        return
    time_us = times[first].as_py()
    raise InvalidRequestsError(
        f"lies outside window {window.key}, which is [{format_us(window.start_us)}, "
        f"{format_us(window.end_us)})",
        row=offset + first,
        column="request_time",
        value=format_us(time_us),
        way_out=f"{grid.home_of(time_us)}.",
        where=where,
        num_rows=pc.sum(outside.cast(pa.int64())).as_py(),
    )
