"""The asset that keeps a history compact: the same data in fewer, larger segments."""

from collections.abc import Sequence
from typing import Any

import dagster as dg

from vlm_dagster.assets.options import beta_features, declared_version
from vlm_dagster.errors import SchemaError
from vlm_dagster.io_managers.failures import told_to_dagster
from vlm_dagster.io_managers.history import VlmHistoryIOManager
from vlm_dagster.io_managers.tables import io_manager_of

__all__ = ["compaction_asset"]


def compaction_asset(
    history: dg.AssetsDefinition,
    *,
    name: str | None = None,
    fanout: int = 8,
    max_windows: int = 512,
    cron: str | None = "30 3 * * *",
    group_name: str | None = None,
    owners: Sequence[str] = (),
) -> dg.AssetsDefinition:
    """An asset without partitions: the layout of a history. Materializing it merges small segments.

    Its data version is the digest of the history's content, which compaction never changes.
    Safe beside sealing, training and other compactions.

    Args:
        history: made by `history_asset`.
        name: `<history>_layout` by default.
        fanout, max_windows: see `HistoryStore.compact`.
        cron: when it materializes by itself (UTC, needs an automation sensor); None: never.

    Raises:
        SchemaError: the asset is no history.
    """
    metadata = history.metadata_by_key[history.key]
    if metadata.get("vlm/kind") != "history":
        raise SchemaError(
            f"asset {history.key.to_user_string()} is no history",
            "Give an asset that history_asset made.",
        )
    io_manager_key = str(metadata["vlm/io_manager_key"])
    condition: dg.AutomationCondition[Any] | None = (
        None if cron is None else dg.AutomationCondition.cron_tick_passed(cron)
    )

    with beta_features():

        @dg.asset(
            name=name or f"{history.key.path[-1]}_layout",
            key_prefix=list(history.key.path[:-1]) or None,
            deps=[history.key],
            required_resource_keys={io_manager_key},
            automation_condition=condition,
            group_name=group_name,
            owners=list(owners),
            kinds={"deltalake"},
            code_version=declared_version("compaction", fanout, max_windows),
            description=(
                f"The files of `{history.key.to_user_string()}`, merged so that reading the newest "
                f"events of users touches few of them: {fanout} small segments become one, up to "
                f"{max_windows} windows.\n\nNo data changes: every window keeps its digest, proved "
                "before the new files replace the old ones. Versions that are pinned keep "
                "replaying from the old ones."
            ),
        )
        def compact_history(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
            with told_to_dagster():
                manager = io_manager_of(context, io_manager_key, VlmHistoryIOManager)
                store = manager.store(history.key)
                report = store.compact(
                    fanout=fanout,
                    max_windows=max_windows,
                    progress=lambda merge: context.log.info(
                        f"merged {merge.first.key} to {merge.last.key}: {len(merge.segments)} "
                        f"segments, {merge.num_events:,} events"
                    ),
                )
                digest = store.snapshot().digest
            return dg.MaterializeResult(
                data_version=dg.DataVersion(digest),
                metadata={
                    "table_uri": store.uri,
                    "version": report.version,
                    "num_merges": len(report.merges),
                    "num_merges_lost_to_others": report.num_lost,
                    "num_events_rewritten": report.num_events_rewritten,
                    "num_bytes_written": report.num_bytes_written,
                    "segments_before": report.segments_before,
                    "segments_after": report.segments_after,
                    "digest": digest,
                },
            )

    return compact_history
