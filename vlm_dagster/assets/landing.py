"""The asset that lands a source: its events, one Parquet file a window, ready to be sealed."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import dagster as dg

from vlm_dagster.assets.figures import windows_table
from vlm_dagster.assets.metadata import column_schema
from vlm_dagster.assets.options import declared_version
from vlm_dagster.events import EventSource, Landing, input_schema, land
from vlm_dagster.io_managers.failures import told_to_dagster
from vlm_dagster.schema import FeatureGroup
from vlm_dagster.windows import Cadence, WindowGrid, format_us

__all__ = ["landing_asset"]

_LOG_EVERY_S = 5.0


def landing_asset(
    *,
    open_source: Callable[[], EventSource],
    group: FeatureGroup,
    directory: Path,
    cadence: Cadence,
    name: str = "raw_events",
    group_name: str | None = None,
    description: str | None = None,
    owners: Sequence[str] = (),
) -> dg.AssetsDefinition:
    """An asset that reads a source once and splits it by window into a folder.

    Landing the same source again reads nothing. The digest of all events is the data version.

    Args:
        open_source: called when the asset is materialized, never when it is defined.
        directory: gets the landing; `Landing.open(directory).events(window)` gives its files.
    """
    grid = WindowGrid(cadence)
    schema = input_schema(group)

    @dg.asset(
        name=name,
        group_name=group_name,
        code_version=declared_version(group.to_json(), cadence),
        description=description
        or (
            f"The `{group.name}` events as they came, split by window ({cadence}): one Parquet file "
            f"each. A staging area: what counts is what is sealed from it."
        ),
        kinds={"parquet"},
        owners=list(owners),
        metadata={"dagster/column_schema": column_schema(schema), "dagster/uri": str(directory)},
    )
    def landed_events(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
        told = time.monotonic()

        def progress(num_bytes: int) -> None:
            nonlocal told
            if time.monotonic() - told >= _LOG_EVERY_S:
                told = time.monotonic()
                context.log.info(f"read {num_bytes:,} of {source.num_bytes:,} bytes")

        with told_to_dagster():
            source = open_source()
            landing = land(source, directory, grid, progress)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(landing.digest), metadata=_facts(landing)
        )

    return landed_events


def _facts(landing: Landing) -> dict[str, dg.MetadataValue | str | int | bool]:
    span = "none"
    if landing.first_us is not None and landing.last_us is not None:
        span = f"{format_us(landing.first_us)} to {format_us(landing.last_us)}"
    counts = [(landed.window.key, landed.num_events) for landed in landing.landed]
    return {
        "dagster/uri": str(landing.directory),
        "dagster/row_count": landing.num_events,
        "digest": landing.digest,
        "span": span,
        "num_windows": len(landing.windows),
        "num_windows_with_events": len(landing.landed),
        "num_lines_dropped": landing.num_dropped,
        "num_bytes": sum(landed.num_bytes for landed in landing.landed),
        "reused": landing.reused,
        "windows": dg.MetadataValue.md(windows_table(counts)),
    }
