"""A plain second opinion on pointers: what a history was at a time, by the definition.

It shares no code with the readers and the pointer builder: the tables are read as anybody's Delta
tables, and histories are Python lists. Slow on purpose, for samples.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from deltalake import DeltaTable

from vlm_dagster.hashing import bucket_of
from vlm_dagster.history import SnapshotRef
from vlm_dagster.pointers import PointerSnapshot
from vlm_dagster.windows import format_us

__all__ = ["LeakageReport", "find_leaks", "newest_requests_us"]

Options = Mapping[str, str] | None
Events = dict[Any, list[tuple[int, Any]]]

_MAX_FILES = 8


@dataclass(frozen=True)
class LeakageReport:
    """How many examples were looked at, and what is wrong with which."""

    num_examples: int
    num_events: int
    problems: tuple[str, ...]


def newest_requests_us(snapshot: PointerSnapshot, options: Options) -> dict[str, int]:
    """The time of each window's last request, UTC microseconds; windows without examples lack."""
    keys = {sealed.window.segment: sealed.window.key for sealed in snapshot.windows}
    newest: dict[str, int] = {}
    for fragment in _fragments(snapshot, list(keys.values()), options):
        segment = ds.get_partition_keys(fragment.partition_expression)["segment"]
        times = fragment.to_table(columns=["request_time"])["request_time"].cast(pa.int64())
        if len(times):
            key = keys[segment]
            newest[key] = max(newest.get(key, 0), pc.max(times).as_py())
    return newest


def find_leaks(
    snapshot: PointerSnapshot, options: Options, *, num_examples: int, seed: int = 0
) -> LeakageReport:
    """Compare a sample of pointers with histories worked out by the definition.

    The history behind a request is every event of that user that was available strictly before it,
    in order of (available_at, event_id). The pointer must end exactly there, and the event that the
    example is about must not be inside.

    Args:
        num_examples: how many to look at, at most, drawn from at most 8 files.
        seed: of the draw.
    """
    sample = _sample(snapshot, options, num_examples, random.Random(seed))
    problems: list[str] = []
    num_events = 0
    for group, pins in snapshot.pins().items():
        if not sample or not pins:
            continue
        # Histories only grow, so the newest pin shows whatever the earlier ones do.
        pin = max(pins, key=lambda p: p.watermark_us or 0)
        users = sorted({row["user_id"] for row in sample})
        snapshot_of_pin = pin.open(options)
        events = _events(pin, snapshot_of_pin.version, users, options)
        asked = pa.array(users, snapshot_of_pin.group.user_id)
        counts = snapshot_of_pin.gone_of(asked).counts.tolist()
        gone = dict(zip(users, counts, strict=True))
        num_events += sum(len(found) for found in events.values())
        about_event = snapshot.spec.request == "event_id" and group == snapshot.spec.target_group
        for row in sample:
            user = row["user_id"]
            wrong = _problem(
                row, group, events.get(user, []), gone[user], snapshot.spec.max_length, about_event
            )
            if wrong:
                problems.append(
                    f"user {row['user_id']!r}, request {row['request_id']!r} at "
                    f"{format_us(row['request_time'])}, {group}: {wrong}"
                )
    return LeakageReport(len(sample), num_events, tuple(problems))


def _problem(
    row: Mapping[str, Any],
    group: str,
    events: Sequence[tuple[int, Any]],
    gone: int,
    max_length: int | None,
    about_event: bool,
) -> str | None:
    """What is wrong with a pointer. `gone` of the user's oldest events were erased or dropped since,
    and nothing but their number is known of them."""
    end, length = row[f"{group}_end_position"], row[f"{group}_length"]
    available = sum(event[0] < row["request_time"] for event in events)
    if not available and end <= gone:
        return None
    if end > gone + available:
        return (
            f"the pointer ends at position {end}, but only {gone + available} events were available "
            f"before the request: it leaks"
        )
    inside = events[max(end - length - gone, 0) : max(end - gone, 0)]
    if about_event and row["request_id"] in [event_id for _, event_id in inside]:
        return "the event that the example is about lies in its own history: it leaks"
    if end < gone + available:
        return (
            f"the pointer ends at position {end}, but {gone + available} events were available before "
            f"the request: it is incomplete"
        )
    # One that was built after events had gone spans what was left then.
    most, least = (
        span if max_length is None else min(span, max_length) for span in (end, end - gone)
    )
    if not least <= length <= most:
        return f"the pointer spans {length} events instead of {most}"
    return None


def _sample(
    snapshot: PointerSnapshot, options: Options, num_examples: int, draw: random.Random
) -> list[dict[str, Any]]:
    groups = snapshot.spec.groups
    columns = [
        "user_id",
        "request_id",
        "request_time",
        *(f"{group}_{part}" for group in groups for part in ("end_position", "length")),
    ]
    fragments = _fragments(snapshot, [s.window.key for s in snapshot.windows], options)
    chosen = draw.sample(fragments, min(_MAX_FILES, len(fragments)))
    rows: list[dict[str, Any]] = []
    for index, fragment in enumerate(chosen):
        table = fragment.to_table(columns=columns)
        share = -(-(num_examples - len(rows)) // (len(chosen) - index))
        picked = draw.sample(range(table.num_rows), min(share, table.num_rows))
        part = table.take(pa.array(sorted(picked), pa.int64()))
        at = part.schema.get_field_index("request_time")
        part = part.set_column(at, "request_time", part["request_time"].cast(pa.int64()))
        rows.extend(part.to_pylist())
    return rows


def _events(pin: SnapshotRef, version: int, users: list[Any], options: Options) -> Events:
    """Every event of some users that a pin shows, in order, read at a version that holds it: where
    the pinned one was retired, that is a later one."""
    table = DeltaTable(pin.uri, version=version, storage_options=dict(options or {}) or None)
    user_type = pa.schema(table.schema()).field("user_id").type
    asked = pa.array(users, user_type)
    buckets = pa.array(bucket_of(asked, _num_buckets(table)), pa.int32())
    # The bucket only spares files; were it wrong, events would be missing, and the check fail.
    wanted = ds.field("bucket").isin(buckets) & ds.field("user_id").isin(asked)
    dataset = table.to_pyarrow_dataset()
    # Where events carry no availability, they are available when they happen.
    clock = "available_at" if "available_at" in dataset.schema.names else "event_time"
    found = dataset.to_table(columns=["user_id", "event_id", clock], filter=wanted)
    events: Events = {}
    columns = (
        found["user_id"].to_pylist(),
        found[clock].cast(pa.int64()).to_pylist(),
        found["event_id"].to_pylist(),
    )
    for user, time_us, event_id in zip(*columns, strict=True):
        if pin.watermark_us is not None and time_us < pin.watermark_us:
            events.setdefault(user, []).append((time_us, event_id))
    for own in events.values():
        own.sort()
    return events


def _num_buckets(table: DeltaTable) -> int:
    return int(json.loads(table.metadata().description)["vlm"]["num_buckets"])


def _fragments(snapshot: PointerSnapshot, keys: list[str], options: Options) -> list[Any]:
    segments = [s.window.segment for s in snapshot.windows if s.window.key in keys]
    if not segments:
        return []
    table = DeltaTable(
        snapshot.uri, version=snapshot.version, storage_options=dict(options or {}) or None
    )
    wanted = ds.field("segment").isin(segments)
    fragments = table.to_pyarrow_dataset().get_fragments(filter=wanted)
    return sorted(fragments, key=lambda fragment: str(fragment.path))
