"""Which snapshot a group's pointers are resolved in, and whether that is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa

from vlm_dagster.errors import PinError, SchemaError
from vlm_dagster.history import Snapshot
from vlm_dagster.pointers import PointerSnapshot
from vlm_dagster.schema import Projection

__all__ = ["open_histories", "tensor_columns"]


def open_histories(
    pointers: PointerSnapshot,
    groups: Sequence[str],
    moved: Mapping[str, str],
    storage_options: Mapping[str, str] | None,
) -> dict[str, Snapshot]:
    """The newest pinned snapshot of each group, proved to go on from every older one.

    A history only grows at its end, so what holds in an older snapshot holds in the newest, provided
    that they agree on the windows they share.

    Raises:
        PinError: the pins of a group do not go on from each other.
    """
    found = {}
    pins = pointers.pins()
    for group in groups:
        if group not in pins:
            raise SchemaError(
                f"the examples have no pointers into {group!r}",
                f"They point into {', '.join(sorted(pins))}.",
            )
        if not pins[group]:
            raise SchemaError(
                f"{pointers.uri} has no sealed window", "Seal pointers before loading them."
            )
        newest = max(pins[group], key=lambda pin: pin.version)
        snapshot = newest.open(storage_options, uri=moved.get(group))
        for pin in pins[group]:
            if (
                pin.table_id != newest.table_id
                or snapshot.digest_at(pin.watermark_us) != pin.digest
            ):
                raise PinError(
                    f"history {group!r} of {pointers.uri}, pinned at version {pin.version}",
                    pinned=f"table {pin.table_id}, digest {pin.digest}",
                    found=f"table {newest.table_id}, digest {snapshot.digest_at(pin.watermark_us)}",
                    way_out="These windows point into histories that do not go on from each "
                    "other: load them separately.",
                )
        found[group] = snapshot
    return found


def tensor_columns(snapshot: Snapshot, projection: Projection) -> list[str]:
    """The columns of a projection, or SchemaError for one that cannot be a tensor."""
    schema = snapshot.group.event_schema
    columns = projection.columns(snapshot.group)
    for name in columns:
        if pa.types.is_string(schema.field(name).type):
            raise SchemaError(
                f"column {name!r} of {snapshot.group.name!r} holds strings, which are no tensor",
                "Leave it out of the projection, or store integer codes instead.",
            )
    return columns
