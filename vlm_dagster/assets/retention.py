"""The asset that lets go of what nothing refers to: versions of a history or of a pointer dataset."""

from collections.abc import Sequence
from typing import Any

import dagster as dg
from pydantic import Field

from vlm_dagster.assets.options import beta_features, declared_version
from vlm_dagster.errors import SchemaError
from vlm_dagster.history import HistoryStore
from vlm_dagster.io_managers.failures import told_to_dagster
from vlm_dagster.io_managers.history import VlmHistoryIOManager
from vlm_dagster.io_managers.pointers import VlmPointerIOManager
from vlm_dagster.io_managers.tables import io_manager_of
from vlm_dagster.pointers import PointerDataset
from vlm_dagster.retention import GcReport
from vlm_dagster.windows import format_us

__all__ = ["GcConfig", "gc_asset"]

_MOST_ROWS = 50


class GcConfig(dg.Config):
    """Run configuration of a collection (the launchpad shows it)."""

    delete: bool | None = Field(
        default=None,
        description=(
            "True retires versions and deletes files; False only says what would go. Empty: as the "
            "asset declares."
        ),
    )
    move_pins: bool | None = Field(
        default=None,
        description=(
            "True lets pins open the newest version where it holds the same content, proved by "
            "digest, so that they hold no older one. Empty: as the asset declares."
        ),
    )
    forget: list[str] = Field(
        default_factory=list,
        description=(
            "Addresses of pointer datasets and checkpoints that are gone for good: those of them "
            "that cannot be opened hold nothing any more. `*` stands for anything."
        ),
    )


def gc_asset(
    table: dg.AssetsDefinition,
    *,
    name: str | None = None,
    delete: bool = False,
    keep_hours: float = 24.0,
    move_pins: bool = False,
    cron: str | None = "0 4 * * *",
    group_name: str | None = None,
    owners: Sequence[str] = (),
) -> dg.AssetsDefinition:
    """An asset without partitions: the versions of a table. Materializing it lets go of those that no
    pin, pointer dataset or checkpoint refers to.

    Its data version is the digest of the table's content, which no collection changes. Safe beside
    sealing, compaction, training and other collections.

    Args:
        table: made by `history_asset` or `pointer_asset`.
        name: `<table>_retention` by default.
        delete: otherwise it only says what would go, and what holds the rest.
        keep_hours, move_pins: see `HistoryStore.gc`.
        cron: when it materializes by itself (UTC, needs an automation sensor); None: never.

    Raises:
        SchemaError: the asset is neither a history nor a pointer dataset.
    """
    metadata = table.metadata_by_key[table.key]
    kind = metadata.get("vlm/kind")
    if kind not in ("history", "pointers"):
        raise SchemaError(
            f"asset {table.key.to_user_string()} is no table of this package",
            "Give an asset that history_asset or pointer_asset made.",
        )
    io_manager_key = str(metadata["vlm/io_manager_key"])
    condition: dg.AutomationCondition[Any] | None = (
        None if cron is None else dg.AutomationCondition.cron_tick_passed(cron)
    )

    with beta_features():

        @dg.asset(
            name=name or f"{table.key.path[-1]}_retention",
            key_prefix=list(table.key.path[:-1]) or None,
            deps=[table.key],
            required_resource_keys={io_manager_key},
            automation_condition=condition,
            group_name=group_name,
            owners=list(owners),
            kinds={"deltalake"},
            code_version=declared_version("retention", delete, keep_hours, move_pins),
            description=(
                f"The versions of `{table.key.to_user_string()}` that are kept: the newest, those "
                f"of the last {keep_hours:g} hours, and those that named pins, pointer datasets and "
                "checkpoints refer to. Everything else "
                f"{'is let go' if delete else 'could be let go'}.\n\nNo data changes, and what is "
                "pinned keeps replaying to the byte."
            ),
        )
        def collect_garbage(
            context: dg.AssetExecutionContext, config: GcConfig
        ) -> dg.MaterializeResult[None]:
            with told_to_dagster():
                owner = _open(context, table.key, str(kind), io_manager_key)
                report = owner.gc(
                    dry_run=not (delete if config.delete is None else config.delete),
                    keep_hours=keep_hours,
                    move_pins=move_pins if config.move_pins is None else config.move_pins,
                    forget=config.forget,
                )
                digest = owner.snapshot().digest
            for one in report.holding.vanished:
                context.log.warning(f"{one.referrer} cannot be opened: {one.problem}")
            return dg.MaterializeResult(
                data_version=dg.DataVersion(digest), metadata=_facts(report, digest)
            )

    return collect_garbage


def _open(
    context: dg.AssetExecutionContext, key: dg.AssetKey, kind: str, io_manager_key: str
) -> HistoryStore | PointerDataset:
    if kind == "history":
        return io_manager_of(context, io_manager_key, VlmHistoryIOManager).store(key)
    return io_manager_of(context, io_manager_key, VlmPointerIOManager).dataset(key)


def _facts(report: GcReport, digest: str) -> dict[str, Any]:
    holding = report.holding
    return {
        "table_uri": report.uri,
        "version": holding.version,
        "dry_run": report.dry_run,
        "num_versions_retired": holding.num_to_retire,
        "num_versions_kept_by_references": len(holding.kept) - 1,
        "num_files_freed": report.purged.num_files,
        "num_bytes_freed": report.purged.num_bytes,
        "num_pins_moved": len(holding.moved),
        "num_referrers_not_found": len(holding.vanished),
        "num_pins_lost": len(holding.lost),
        "protection_switched_off": bool(report.unprotected),
        "holds": dg.MetadataValue.md(_table(report)),
        "digest": digest,
    }


def _table(report: GcReport) -> str:
    """What holds which version, as Markdown."""
    lines = [
        "| version | committed | by | bytes | only here | held by |",
        "|--:|---|---|--:|--:|---|",
    ]
    newest = report.holding.version
    for kept in report.holding.kept[:_MOST_ROWS]:
        at = "" if kept.at_s is None else format_us(int(kept.at_s * 1e6))[:19]
        held = ["the newest"] if kept.version == newest else []
        held += dict.fromkeys(str(hold) for hold in kept.holds)
        more = [f"... and {len(held) - 3:,} more"] if len(held) > 3 else []
        cells = [str(kept.version), at, kept.what, f"{kept.num_bytes:,}", f"{kept.own_bytes:,}"]
        cells.append("; ".join([*held[:3], *more]))
        lines.append(f"| {' | '.join(cell.replace('|', ' ') for cell in cells)} |")
    if len(report.holding.kept) > _MOST_ROWS:
        lines.append(f"\n... and {len(report.holding.kept) - _MOST_ROWS:,} more versions")
    lines += [f"\n**Not found:** {one.referrer}: {one.problem}" for one in report.holding.vanished]
    return "\n".join(lines)
