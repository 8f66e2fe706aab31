"""History assets: the events of one feature group, a window a partition, each sealed once."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import dagster as dg

from vlm_dagster.assets.metadata import column_schema
from vlm_dagster.assets.options import (
    HistorySealConfig,
    OnSealed,
    beta_features,
    declared_version,
    on_sealed_of,
)
from vlm_dagster.assets.partitions import grid_of, start_of
from vlm_dagster.assets.sealing import materialize_windows
from vlm_dagster.assets.sources import WindowSource
from vlm_dagster.errors import WindowSealedError
from vlm_dagster.io_managers.failures import told_to_dagster
from vlm_dagster.io_managers.handles import Sealing, keep_sealed
from vlm_dagster.io_managers.history import VlmHistoryIOManager
from vlm_dagster.io_managers.tables import io_manager_of
from vlm_dagster.schema import FeatureGroup
from vlm_dagster.sealed import StagedWindow
from vlm_dagster.sealed.stripes import DEFAULT_EDGES

__all__ = ["history_asset"]


def history_asset(
    group: FeatureGroup,
    *,
    events: Callable[..., Any],
    partitions_def: dg.TimeWindowPartitionsDefinition,
    name: str | None = None,
    key_prefix: str | Sequence[str] | None = None,
    num_buckets: int = 16,
    bands: Sequence[int] = DEFAULT_EDGES,
    portable: bool = False,
    on_sealed: Literal["verify", "reuse"] = "verify",
    deps: Iterable[Any] = (),
    io_manager_key: str = "history_io_manager",
    required_resource_keys: Iterable[str] = (),
    backfill_policy: dg.BackfillPolicy | None = None,
    automation_condition: dg.AutomationCondition[dg.AssetKey] | None = None,
    group_name: str | None = None,
    code_version: str | None = None,
    description: str | None = None,
    kinds: Iterable[str] = ("deltalake", "parquet"),
    owners: Sequence[str] = (),
    tags: Mapping[str, str] | None = None,
) -> dg.AssetsDefinition:
    """An asset whose partitions are the sealed windows of a history table.

    Materializing a partition stages the window's events (sorted files that nobody sees yet); the IO
    manager then commits them, once, in the Delta log. A window that is sealed already stays as it
    is: with the same content the run is green and marked `reused`, with other content it fails,
    naming both digests; unless the run is configured with `correct_because`, a reason: then the
    window is replaced by its next revision.

    Args:
        group: what the events look like.
        events: `events(window)`: the events of one window as Arrow data or Parquet paths (see
            `HistoryStore.seal`); None for a window without any. It may also ask for `context` by
            name, e.g. to reach resources.
        partitions_def: whole UTC hours, days, or weeks. Its first partition is the first window of
            the table, from which positions count.
        name: the asset's name; `<group>_history` by default.
        num_buckets: how many files a window is split into, by user.
        bands, portable: see `HistoryStore.create`.
        on_sealed: "verify" reads the source again for a sealed window and compares digests, so
            that a source that drifted is found out; "reuse" keeps what is sealed and does not
            read the source. The launchpad can choose otherwise for one run.
        io_manager_key: a `VlmHistoryIOManager` among the resources.
        backfill_policy: one run over all partitions by default; each still gets its own data
            version. `dg.BackfillPolicy.multi_run()` for a run a partition.
        code_version: by default it changes when the declaration of the table does.

    Raises:
        SchemaError: the partitions are not windows of UTC, or an option is unknown.
    """
    grid = grid_of(partitions_def)
    start = start_of(partitions_def)
    default_on_sealed = on_sealed_of(on_sealed)
    source = WindowSource(
        events, what="events", offered={"context": "the AssetExecutionContext of the run"}
    )
    schema = column_schema(group.event_schema)
    declaration = (group.to_json(), num_buckets, grid.cadence, start, list(bands), portable)

    with beta_features():

        @dg.asset(
            name=name or f"{group.name}_history",
            key_prefix=key_prefix,
            partitions_def=partitions_def,
            deps=list(deps),
            io_manager_key=io_manager_key,
            required_resource_keys={io_manager_key, *required_resource_keys},
            backfill_policy=backfill_policy or dg.BackfillPolicy.single_run(),
            automation_condition=automation_condition,
            group_name=group_name,
            code_version=code_version or declared_version(*declaration),
            description=description or _describe(group, grid.cadence, num_buckets),
            kinds=set(kinds),
            owners=list(owners),
            tags=tags,
            metadata={
                "dagster/column_schema": schema,
                "vlm/kind": "history",
                "vlm/feature_group": group.name,
                "vlm/io_manager_key": io_manager_key,
            },
        )
        def sealed_history(
            context: dg.AssetExecutionContext, config: HistorySealConfig
        ) -> Iterator[dg.MaterializeResult[Sealing]]:
            choice = config.on_sealed or default_on_sealed
            with told_to_dagster():
                manager = io_manager_of(context, io_manager_key, VlmHistoryIOManager)
                store = manager.create_store(
                    context.asset_key,
                    group,
                    num_buckets=num_buckets,
                    windows=grid.cadence,
                    start=start,
                    bands=bands,
                    portable=portable,
                )
                sealed = {found.window.key: found for found in store.sealed_windows()}
                staged: list[StagedWindow] = []
                for key in context.partition_keys:
                    window = grid.parse(key)
                    found = sealed.get(key)
                    if found is not None and choice is OnSealed.REUSE:
                        staged.append(keep_sealed(store.uri, store.table_id, found))
                        continue
                    rows = source(window, context=context)
                    if rows is None:
                        rows = []
                    if found is not None and config.correct_because:
                        one = store.stage_correction(key, rows, reason=config.correct_because)
                        context.log.info(f"correcting window {key}: {config.correct_because}")
                    else:
                        one = store.stage(key, rows)
                    if found is not None and not (one.correction or store.is_sealed_as(one)):
                        # Found out here, before any window of the run is committed.
                        raise WindowSealedError(
                            table=store.uri, window=key, sealed=found.digest, offered=one.digest
                        )
                    context.log.info(f"staged window {key}: {one.num_rows:,} events, {one.digest}")
                    staged.append(one)
            yield from materialize_windows(
                context, store, staged, schema=schema, facts=lambda _: {"feature_group": group.name}
            )

    return sealed_history


def _describe(group: FeatureGroup, cadence: str, num_buckets: int) -> str:
    traits = ", ".join(f"`{trait.name}`" for trait in group.traits) or "none"
    return (
        f"Every `{group.name}` event, stored once, in an immutable and versioned Delta table.\n\n"
        f"- **Partition**: one UTC window ({cadence}) of the time from which the event could have "
        f"been served.\n"
        f"- **Traits**: {traits}\n"
        f"- **Layout**: {num_buckets} buckets of users; a user's events lie together, oldest "
        f"first.\n\n"
        f"A sealed window never changes: the same content again is *reused*, other content fails "
        f"with both digests. The digest of the content is the data version."
    )
