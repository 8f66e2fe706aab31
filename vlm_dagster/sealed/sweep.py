"""Removing what a killed process left behind: files in place that no commit ever named."""

from __future__ import annotations

import json
import time
from urllib.parse import unquote

import pyarrow.parquet as pq

from vlm_dagster.sealed.table import SealedTable
from vlm_dagster.storage import STAGING, FileInfo

__all__ = ["DEFAULT_GRACE_S", "sweep"]

# A file younger than this may belong to somebody who is about to commit it.
DEFAULT_GRACE_S = 86_400.0


def sweep(
    table: SealedTable, *, older_than_s: float = DEFAULT_GRACE_S, dry_run: bool = True
) -> list[FileInfo]:
    """Find, and unless `dry_run` delete, files that no commit in the log names.

    Files that some version names are never touched, live or not: letting go of old versions is
    another job. Files younger than `older_than_s` seconds are spared, since a sealer may be about to
    commit them: do not set it below the longest time that sealing a window takes.
    """
    # Listed first: a file that is committed after this instant is then in the log that we read.
    found = list(table.storage.list())
    named = _named_in_log(table, found)
    limit = time.time() - older_than_s
    orphans = [
        info
        for info in found
        if info.modified_s <= limit
        and (
            info.path.startswith(f"{STAGING}/")
            or (info.path.startswith("segment=") and info.path not in named)
        )
    ]
    if not dry_run:
        for info in orphans:
            table.storage.delete(info.path)
    return sorted(orphans, key=lambda info: info.path)


def _named_in_log(table: SealedTable, found: list[FileInfo]) -> set[str]:
    named: set[str] = set()
    listed = {info.path for info in found if info.path.startswith("_delta_log/")}
    listed |= {info.path for info in table.storage.list("_delta_log")}
    for path in listed:
        if path.endswith(".json"):
            for line in table.storage.read_bytes(path).splitlines():
                if line.startswith((b'{"add"', b'{"remove"')):
                    (action,) = json.loads(line).values()
                    named.add(unquote(action["path"]))
        elif path.endswith(".parquet"):
            with table.storage.open_input(path) as source:
                actions = pq.ParquetFile(source).read(columns=["add.path", "remove.path"])
            for kind in ("add", "remove"):
                for action in actions.column(kind).drop_null().to_pylist():
                    if action["path"] is not None:
                        named.add(unquote(action["path"]))
    return named
