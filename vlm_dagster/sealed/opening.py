"""Creating and opening the Delta table behind a sealed table, with errors that say what is wrong."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from vlm_dagster.errors import StorageError, TableError
from vlm_dagster.sealed.spec import TABLE_FORMAT, TableSpec
from vlm_dagster.storage import open_storage

__all__ = ["create_delta", "open_delta", "plain", "read_declaration", "table_kind"]

FIRST_COMMIT = f"_delta_log/{0:020d}.json"
_CONFIGURATION = {
    # A backstop against other writers; the lock is what makes a window write-once.
    "delta.appendOnly": "true",
    # Pinned versions must stay readable, so nothing is cleaned away behind our back.
    "delta.enableExpiredLogCleanup": "false",
    "delta.logRetentionDuration": "interval 36500 days",
    "delta.deletedFileRetentionDuration": "interval 36500 days",
}


def plain(options: Mapping[str, str] | None) -> dict[str, str] | None:
    """Storage options as deltalake takes them."""
    return dict(options) if options else None


def create_delta(uri: str, spec: TableSpec, options: Mapping[str, str] | None) -> None:
    """Create the Delta table, unless there is one.

    Of processes that create it at the same instant, exactly one does. deltalake's own `create` is no
    such thing: with every mode, a racing creation may commit a second declaration as version 1, and
    the table changes its id and its buckets. So it writes the first commit elsewhere, and that
    goes into place here only if there is none.
    """
    try:
        if DeltaTable.is_deltatable(uri, plain(options)):
            return
        with tempfile.TemporaryDirectory(prefix="vlm-create-") as folder:
            DeltaTable.create(
                folder,
                schema=spec.delta_schema,
                partition_by=["segment", "bucket"],
                name=spec.name,
                description=json.dumps({"vlm": spec.to_json()}, sort_keys=True),
                configuration=dict(_CONFIGURATION),
            )
            actions = [
                json.loads(line) for line in Path(folder, FIRST_COMMIT).read_text().splitlines()
            ]
    except (DeltaError, OSError) as error:
        raise StorageError(uri, "creating the table", error) from error
    for action in actions:
        if "commitInfo" in action:
            action["commitInfo"]["operationParameters"]["location"] = uri
    lines = (json.dumps(action, separators=(",", ":")) for action in actions)
    open_storage(uri, options).put_new("\n".join(lines).encode(), FIRST_COMMIT)


def open_delta(uri: str, version: int | None, options: Mapping[str, str] | None) -> DeltaTable:
    if version is not None and (not isinstance(version, int) or not 0 <= version < 2**63):
        raise TableError(uri, f"version {version!r} is not a number from 0", "Give one, or None.")
    try:
        return DeltaTable(uri, version=version, storage_options=plain(options))
    except TableNotFoundError:
        if version is not None and DeltaTable.is_deltatable(uri, plain(options)):
            raise TableError(
                uri,
                f"version {version} can no longer be opened",
                "Its log was cleaned away, or never existed; use a version that "
                f"`vlm-dagster inspect {uri}` lists.",
            ) from None
        raise TableError(
            uri, "there is no Delta table here", "Check the address, or create the table first."
        ) from None
    except DeltaError as error:
        if version is None:
            raise TableError(
                uri, f"the table cannot be opened ({error})", "Repair its log."
            ) from error
        raise TableError(
            uri,
            f"version {version} cannot be opened ({error})",
            f"Use a version that `vlm-dagster inspect {uri}` lists.",
        ) from error
    except OSError as error:
        raise StorageError(uri, "opening the table", error) from error


def table_kind(uri: str, options: Mapping[str, str] | None) -> str:
    """What kind of sealed table lies there: "history" or "pointers"; TableError if none does."""
    declared, _ = _read_declaration(uri, options)
    return str(declared["kind"])


def read_declaration(
    uri: str, kind: str, options: Mapping[str, str] | None
) -> tuple[dict[str, Any], DeltaTable]:
    """What a table was declared to be, and a handle of its newest version; TableError unless it is
    one of ours."""
    declared, handle = _read_declaration(uri, options)
    if declared["kind"] != kind:
        raise TableError(
            uri,
            f"this is a {declared['kind']} table, not a {kind} table",
            "Open it with the class of its own kind.",
        )
    return declared, handle


def _read_declaration(
    uri: str, options: Mapping[str, str] | None
) -> tuple[dict[str, Any], DeltaTable]:
    handle = open_delta(uri, None, options)
    try:
        declared = json.loads(handle.metadata().description or "")["vlm"]
        number, _ = int(declared["format"]), declared["kind"]
    except (ValueError, KeyError, TypeError):
        raise TableError(
            uri,
            "this Delta table is not one of ours (its description does not declare it)",
            "Give the address of a table that vlm-dagster created.",
        ) from None
    if number > TABLE_FORMAT:
        raise TableError(
            uri,
            f"the table has format {number}, newer than this code's {TABLE_FORMAT}",
            "Upgrade vlm-dagster.",
        )
    if number < TABLE_FORMAT:
        raise TableError(
            uri,
            f"the table has format {number}, older than this code's {TABLE_FORMAT}",
            "Seal its events into a new table.",
        )
    return declared, handle
