"""Where the tables of assets lie: what the IO managers of histories and pointers share."""

from __future__ import annotations

from typing import TypeVar

import dagster as dg
from pydantic import Field

from vlm_dagster.errors import SchemaError
from vlm_dagster.io_managers.base import DescribedIOManager
from vlm_dagster.storage import normalize_uri

__all__ = ["TableIOManager", "input_keys", "io_manager_of"]

Manager = TypeVar("Manager", bound="TableIOManager")


class TableIOManager(DescribedIOManager):
    """Maps an asset to the table that holds it, and knows how to reach the storage."""

    root: str = Field(
        description=(
            "Folder or URL (s3://, gs://, az://) under which every asset has its table: the asset "
            "`a/b` lies at `ROOT/a/b`. A relative folder counts from where Dagster was started."
        ),
    )
    storage_options: dict[str, str] = Field(
        default_factory=dict,
        repr=False,
        description=(
            "Options of the object store, as deltalake and obstore spell them "
            "(`aws_access_key_id`, `aws_conditional_put`, ...). Give secrets as `dg.EnvVar(...)`: "
            "then the UI shows the variable's name only. The values never reach logs, metadata, "
            "handles or checkpoints."
        ),
    )
    table_uris: dict[str, str] = Field(
        default_factory=dict,
        description=(
            "Assets whose table lies elsewhere: asset key as in the UI (`a/b`) to folder or URL."
        ),
    )

    def table_uri(self, asset_key: dg.AssetKey) -> str:
        """The address of an asset's table."""
        name = asset_key.to_user_string()
        found = self.table_uris.get(name)
        return normalize_uri(found if found is not None else f"{self.root.rstrip('/')}/{name}")

    @property
    def options(self) -> dict[str, str] | None:
        """The storage options, or None where there are none."""
        return dict(self.storage_options) or None


def input_keys(context: dg.InputContext) -> list[str]:
    """The upstream partitions that an input maps to, oldest first.

    Raises:
        SchemaError: upstream has no partitions, so it cannot be windows.
    """
    if not context.has_asset_partitions:
        raise SchemaError(
            f"asset {context.asset_key.to_user_string()} has no partitions",
            "Tables of windows belong to assets with a time partition: use history_asset or "
            "pointer_asset, or set partitions_def.",
        )
    return list(context.asset_partition_keys)


def io_manager_of(
    context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext, key: str, kind: type[Manager]
) -> Manager:
    """The IO manager behind a resource key, or SchemaError."""
    found = getattr(context.resources, key)
    if not isinstance(found, kind):
        raise SchemaError(
            f"resource {key!r} is a {type(found).__name__}",
            f"Define it as a {kind.__name__}, e.g. resources={{{key!r}: "
            f"{kind.__name__}(root='./.vlm/tables')}}.",
        )
    return found
