"""Which window grid a Dagster partitions definition is."""

from __future__ import annotations

import dagster as dg

from vlm_dagster.errors import SchemaError
from vlm_dagster.windows import Cadence, WindowGrid

__all__ = ["grid_of", "partitions_of", "start_of"]

_CADENCES: dict[str, Cadence] = {
    "0 * * * *": "hourly",
    "0 0 * * *": "daily",
    "0 0 * * 0": "weekly",
}


def grid_of(partitions_def: object) -> WindowGrid:
    """The grid whose windows are exactly the partitions.

    Raises:
        SchemaError: the partitions are not hours, days or weeks (from Sunday) of UTC, or their keys
            are spelled otherwise.
    """
    if not isinstance(partitions_def, dg.TimeWindowPartitionsDefinition):
        raise SchemaError(
            f"partitions_def={partitions_def!r} is not a partition of time",
            "Use dg.DailyPartitionsDefinition, dg.HourlyPartitionsDefinition or "
            "dg.WeeklyPartitionsDefinition.",
        )
    if str(partitions_def.timezone) != "UTC":
        raise SchemaError(
            f"partitions_def is in time zone {partitions_def.timezone!r}",
            "Windows are slices of UTC: drop `timezone`, or set it to 'UTC'. A local day has 23 to "
            "25 hours, and its partition key would name another slice of time in another zone.",
        )
    cadence = _CADENCES.get(partitions_def.cron_schedule)
    if cadence is None:
        raise SchemaError(
            f"partitions_def repeats at {partitions_def.cron_schedule!r} (cron)",
            "Use whole UTC hours, days, or weeks from Sunday, without an offset: cron "
            f"{', '.join(repr(c) for c in _CADENCES)}.",
        )
    grid = WindowGrid(cadence)
    if partitions_def.exclusions:
        raise SchemaError(
            "partitions_def excludes some windows",
            "A history is complete only up to its first missing window: drop `exclusions`, and "
            "seal empty windows as empty.",
        )
    first = partitions_def.get_first_partition_window()
    if first is not None:
        start = first.start
        window = grid.containing(int(start.timestamp()) * 1_000_000)
        key = start.strftime(partitions_def.fmt)
        if key != window.key:
            raise SchemaError(
                f"partitions_def spells its first key {key!r} (fmt={partitions_def.fmt!r})",
                f"Drop `fmt`, so that it is {window.key!r}.",
            )
    return grid


def partitions_of(
    cadence: Cadence, first: str, end: str | None = None
) -> dg.TimeWindowPartitionsDefinition:
    """The partitions of a cadence, from the window `first` up to, not including, the window `end`.

    Without `end`, a new partition appears whenever a window is complete.
    """
    grid = WindowGrid(cadence)
    start = grid.parse(first).key
    stop = None if end is None else grid.parse(end).key
    if cadence == "hourly":
        return dg.HourlyPartitionsDefinition(start_date=start, end_date=stop)
    if cadence == "weekly":
        return dg.WeeklyPartitionsDefinition(start_date=start, end_date=stop)
    return dg.DailyPartitionsDefinition(start_date=start, end_date=stop)


def start_of(partitions_def: dg.TimeWindowPartitionsDefinition) -> str:
    """The key of the first partition, be it past or to come."""
    grid = grid_of(partitions_def)
    start_us = int(partitions_def.start.timestamp()) * 1_000_000
    window = grid.containing(start_us)
    return (window if window.start_us == start_us else grid.at(window.index + 1)).key
