"""What a materialization tells: the entries of its metadata, spelled in one place.

The `dagster/...` keys are those that the UI knows (it shows an address, a row count and the columns
in places of their own). No entry carries a credential.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg
import pyarrow as pa

from vlm_dagster.storage import redact
from vlm_dagster.windows import Window, format_us

__all__ = ["bytes_value", "column_schema", "pins_value", "watermark_value", "window_facts"]

_MEANINGS = {
    "user_id": "Whose event it is.",
    "event_id": "The event; unique within a user.",
    "event_time": "When it happened (UTC microseconds).",
    "available_at": "From when on the platform could have served it (UTC microseconds).",
    "request_time": "When the sequence was asked for (UTC microseconds).",
    "segment": "Partition column: the window, as a folder name.",
    "bucket": "Partition column: hash of the user modulo the number of buckets.",
}


def column_schema(schema: pa.Schema) -> dg.TableSchema:
    """An Arrow schema as the UI's table of columns."""
    return dg.TableSchema(
        columns=[
            dg.TableColumn(
                field.name,
                str(field.type),
                description=_MEANINGS.get(field.name),
                constraints=dg.TableColumnConstraints(nullable=field.nullable),
            )
            for field in schema
        ]
    )


def bytes_value(num_bytes: int) -> dg.IntMetadataValue:
    """A size in bytes, as a number, so that the UI can plot it over the partitions."""
    return dg.MetadataValue.int(int(num_bytes))


def watermark_value(watermark_us: int | None) -> dg.TextMetadataValue:
    """A watermark as a readable UTC instant."""
    return dg.MetadataValue.text(
        "(nothing sealed)" if watermark_us is None else format_us(watermark_us)
    )


def pins_value(pins: Mapping[str, Any] | Sequence[Any]) -> dg.JsonMetadataValue:
    """Pins as JSON: of every input its address, table id, version, digest and watermark."""
    return dg.MetadataValue.json(_readable(pins))


def _readable(value: Any) -> Any:
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for name, item in value.items():
            if name == "uri" and isinstance(item, str):
                found[name] = redact(item)
            elif name == "watermark_us" and isinstance(item, int):
                found["watermark"] = format_us(item)
            else:
                found[str(name)] = _readable(item)
        return found
    if isinstance(value, list | tuple):
        return [_readable(item) for item in value]
    return value


def window_facts(windows: Sequence[Window]) -> dict[str, Any]:
    """Which slice of time was materialized."""
    first, last = windows[0], windows[-1]
    span = f"{format_us(first.start_us)} to {format_us(last.end_us)}"
    return {"window": span, **({"num_windows": len(windows)} if len(windows) > 1 else {})}
