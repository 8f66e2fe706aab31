"""Pointer assets: training examples that name a stretch of history, a window a partition."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import dagster as dg

from vlm_dagster.assets.metadata import column_schema, pins_value
from vlm_dagster.assets.options import (
    AssetKeyLike,
    OnSealed,
    SealConfig,
    beta_features,
    declared_version,
    on_sealed_of,
)
from vlm_dagster.assets.partitions import grid_of, start_of
from vlm_dagster.assets.sealing import materialize_windows
from vlm_dagster.assets.sources import WindowSource
from vlm_dagster.errors import SchemaError, WindowSealedError
from vlm_dagster.history import PinOpener, SnapshotRef
from vlm_dagster.io_managers.failures import told_to_dagster
from vlm_dagster.io_managers.handles import Sealing, keep_sealed
from vlm_dagster.io_managers.pointers import VlmPointerIOManager
from vlm_dagster.io_managers.tables import io_manager_of
from vlm_dagster.pointers import PointerSpec
from vlm_dagster.sealed import SealedWindow, StagedWindow

__all__ = ["pointer_asset"]

Refs = dict[str, SnapshotRef]


def pointer_asset(
    spec: PointerSpec,
    *,
    requests: Callable[..., Any],
    histories: Sequence[dg.AssetsDefinition] | Mapping[str, AssetKeyLike],
    partitions_def: dg.TimeWindowPartitionsDefinition,
    name: str | None = None,
    key_prefix: str | Sequence[str] | None = None,
    num_buckets: int = 16,
    on_sealed: Literal["verify", "reuse"] = "verify",
    deps: Iterable[Any] = (),
    io_manager_key: str = "pointer_io_manager",
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
    """An asset whose partitions are the sealed windows of a pointer dataset.

    Each partition depends on the same partition of its history assets, and is resolved in the first
    version of each history whose watermark covers the window: the same one whenever it is asked.
    These pins are on every materialization.

    Args:
        spec: what the examples hold, and into which feature groups they point.
        requests: `requests(window)`: the requests of one window as Arrow data or Parquet paths
            (see `PointerDataset.seal`); None for a window without any. It may also ask by name
            for `context`, and for `histories`, a dict from feature group to the pinned
            `SnapshotRef`.
        histories: the history asset of each feature group of `spec`: definitions made by
            `history_asset`, or a dict from feature group to asset key.
        partitions_def: as for `history_asset`; usually the very same.
        num_buckets: as the histories', so that a reader finds a user's pointers and histories in
            buckets of the same number.
        on_sealed, backfill_policy, code_version: as for `history_asset`.
        io_manager_key: a `VlmPointerIOManager` among the resources.

    Raises:
        SchemaError: the partitions are not windows of UTC, or a feature group has no history.
    """
    grid = grid_of(partitions_def)
    start = start_of(partitions_def)
    default_on_sealed = on_sealed_of(on_sealed)
    source = WindowSource(
        requests,
        what="requests",
        offered={
            "context": "the AssetExecutionContext of the run",
            "histories": "a dict from feature group to its pinned SnapshotRef",
        },
    )
    upstream = _history_keys(spec, histories)
    schema = column_schema(spec.schema)
    declaration = (spec.to_json(), num_buckets, grid.cadence, start)

    with beta_features():

        @dg.asset(
            name=name or f"{spec.name}_pointers",
            key_prefix=key_prefix,
            partitions_def=partitions_def,
            ins={group: dg.AssetIn(key=key) for group, key in upstream.items()},
            deps=list(deps),
            io_manager_key=io_manager_key,
            required_resource_keys={io_manager_key, *required_resource_keys},
            backfill_policy=backfill_policy or dg.BackfillPolicy.single_run(),
            automation_condition=automation_condition,
            group_name=group_name,
            code_version=code_version or declared_version(*declaration),
            description=description or _describe(spec, grid.cadence),
            kinds=set(kinds),
            owners=list(owners),
            tags=tags,
            metadata={
                "dagster/column_schema": schema,
                "vlm/kind": "pointers",
                "vlm/feature_groups": ", ".join(spec.groups),
                "vlm/io_manager_key": io_manager_key,
            },
        )
        def sealed_pointers(
            context: dg.AssetExecutionContext,
            config: SealConfig,
            **inputs: SnapshotRef | Refs,
        ) -> Iterator[dg.MaterializeResult[Sealing]]:
            choice = config.on_sealed or default_on_sealed
            pins: dict[str, Refs] = {}
            with told_to_dagster():
                manager = io_manager_of(context, io_manager_key, VlmPointerIOManager)
                dataset = manager.create_dataset(
                    context.asset_key,
                    spec,
                    num_buckets=num_buckets,
                    windows=grid.cadence,
                    start=start,
                )
                sealed = {found.window.key: found for found in dataset.snapshot().windows}
                staged: list[StagedWindow] = []
                for key in context.partition_keys:
                    pins[key] = _of_window(key, inputs)
                opened = PinOpener(manager.options)
                for key in context.partition_keys:
                    found = sealed.get(key)
                    if found is not None and choice is OnSealed.REUSE:
                        staged.append(keep_sealed(dataset.uri, dataset.table_id, found))
                        continue
                    rows = source(grid.parse(key), context=context, histories=pins[key])
                    if rows is None:
                        rows = []
                    snapshots = {group: opened(ref) for group, ref in pins[key].items()}
                    one = dataset.stage(key, rows, snapshots)
                    if found is not None and found.digest != one.digest:
                        # Found out here, before any window of the run is committed.
                        raise WindowSealedError(
                            table=dataset.uri, window=key, sealed=found.digest, offered=one.digest
                        )
                    context.log.info(
                        f"staged window {key}: {one.num_rows:,} examples, {one.digest}"
                    )
                    staged.append(one)
            yield from materialize_windows(
                context,
                dataset,
                staged,
                schema=schema,
                facts=lambda one: {
                    **_example_facts(one),
                    "pins": _pins(one, sealed.get(one.window.key)),
                },
            )

    return sealed_pointers


def _history_keys(
    spec: PointerSpec,
    histories: Sequence[dg.AssetsDefinition] | Mapping[str, AssetKeyLike],
) -> dict[str, dg.AssetKey]:
    """The history asset of each feature group, in the order of the spec."""
    if isinstance(histories, Mapping):
        given = {group: dg.AssetKey.from_coercible(key) for group, key in histories.items()}
    else:
        given = {}
        for history in histories:
            group = history.metadata_by_key[history.key].get("vlm/feature_group")
            if not isinstance(group, str):
                raise SchemaError(
                    f"asset {history.key.to_user_string()} does not say which feature group it holds",
                    "Pass what history_asset made, or a dict from feature group to asset key.",
                )
            given[group] = history.key
    lacking = [group for group in spec.groups if group not in given]
    extra = [group for group in given if group not in spec.groups]
    if lacking or extra:
        wrong = f"has no history for {lacking[0]!r}" if lacking else f"does not use {extra[0]!r}"
        raise SchemaError(
            f"pointer dataset {spec.name!r} points into {', '.join(spec.groups)}, and {wrong}",
            f"Give `histories` for exactly these groups; given are {', '.join(given) or 'none'}.",
        )
    return {group: given[group] for group in spec.groups}


def _of_window(key: str, inputs: Mapping[str, SnapshotRef | Refs]) -> Refs:
    """The pins of one window: an input of one partition is a ref, of several a dict of them."""
    return {
        group: value if isinstance(value, SnapshotRef) else value[key]
        for group, value in inputs.items()
    }


def _pins(staged: StagedWindow, sealed: SealedWindow | None) -> dg.JsonMetadataValue:
    """The pins that the window is sealed with: those from back then, if it was sealed before."""
    return pins_value(staged.facts["pins"] if sealed is None else sealed.facts["pins"])


def _example_facts(staged: StagedWindow) -> dict[str, Any]:
    """What was counted while the pointers were built."""
    return {
        f"{name}_examples": staged.facts[name]
        for name in ("num_empty", "num_unknown")
        if name in staged.facts
    }


def _describe(spec: PointerSpec, cadence: str) -> str:
    groups = ", ".join(f"`{group}`" for group in spec.groups)
    columns = ", ".join(f"`{trait.name}`" for trait in spec.columns) or "none"
    asked = (
        f"one example an event of `{spec.target_group}`, which is to be predicted"
        if spec.request == "event_id"
        else "one example a request, at the time that it states"
    )
    length = (
        "whole histories" if spec.max_length is None else f"the newest {spec.max_length:,} events"
    )
    return (
        f"Training examples that *name* a stretch of history instead of copying it.\n\n"
        f"- **Partition**: one UTC window ({cadence}) of request times; {asked}\n"
        f"- **Histories**: {groups}; {length}\n"
        f"- **Labels and candidate features**: {columns}\n\n"
        f"Each window is resolved in the first version of every history that is complete up to the "
        f"window's end. These pins (address, version, digest) are in the metadata of every "
        f"materialization; the digest of the examples is the data version."
    )
