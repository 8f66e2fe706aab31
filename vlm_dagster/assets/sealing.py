"""From staged windows to materializations: one data version a window, whatever the run's span."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import dagster as dg

from vlm_dagster.assets.metadata import window_facts
from vlm_dagster.io_managers.handles import Sealing
from vlm_dagster.io_managers.sealing import SealableTable, sealed_facts
from vlm_dagster.sealed import StagedWindow

__all__ = ["materialize_windows"]

_DATA_VERSION = "dagster/data_version"
_USER_PROVIDED = "dagster/data_version_is_user_provided"


def materialize_windows(
    context: dg.AssetExecutionContext,
    table: SealableTable,
    staged: Sequence[StagedWindow],
    *,
    schema: dg.TableSchema,
    facts: Callable[[StagedWindow], Mapping[str, Any]],
) -> Iterator[dg.MaterializeResult[Sealing]]:
    """Hand staged windows to the IO manager, then report each with its own data version.

    A step has one data version and one set of metadata for all of its partitions. So after the IO
    manager has committed, every window of a run over several gets a materialization of its own,
    logged in the same run; being the newest, that is the one that Dagster goes by.

    Args:
        schema: the table's columns.
        facts: what is to be told of one window beside what the IO manager knows.
    """
    sealing = Sealing.of(staged)
    common = {"dagster/column_schema": schema, **window_facts([s.window for s in sealing.staged])}
    if len(sealing.staged) == 1:
        common |= facts(sealing.staged[0])
    yield dg.MaterializeResult(
        value=sealing,
        data_version=dg.DataVersion(_joint_digest(sealing.staged)),
        metadata=common,
    )
    if len(sealing.staged) == 1:
        return
    tags = _tags_just_logged(context)
    for one, sealed in zip(sealing.staged, sealing.sealed, strict=True):
        context.log_event(
            dg.AssetMaterialization(
                asset_key=context.asset_key,
                partition=one.window.key,
                metadata={
                    "dagster/column_schema": schema,
                    **window_facts([one.window]),
                    **facts(one),
                    **sealed_facts(table, sealed, sealing.watermark_us),
                },
                tags={**tags, _DATA_VERSION: sealed.digest, _USER_PROVIDED: "true"},
            )
        )


def _joint_digest(staged: tuple[StagedWindow, ...]) -> str:
    if len(staged) == 1:
        return staged[0].digest
    lines = "\n".join(f"{window.window.key}={window.digest}" for window in staged)
    return hashlib.sha256(lines.encode()).hexdigest()


def _tags_just_logged(context: dg.AssetExecutionContext) -> dict[str, str]:
    """Code version and provenance as Dagster worked them out for this step."""
    records = context.instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=context.asset_key), limit=1
    ).records
    if not records or records[0].run_id != context.run.run_id:
        return {}
    materialization = records[0].asset_materialization
    return dict(materialization.tags or {}) if materialization is not None else {}
