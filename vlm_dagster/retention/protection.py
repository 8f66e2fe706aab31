"""The table properties that keep other writers' housekeeping away from pinned versions.

A table is created with them. Whoever may write to it can change them: then the next checkpoint of any
writer may delete the logs of pinned versions, and a `VACUUM` their files.
"""

from __future__ import annotations

from vlm_dagster.sealed.attempts import attempted
from vlm_dagster.sealed.table import SealedTable

__all__ = ["PROTECTION", "missing_protection", "restore_protection"]

PROTECTION = {
    "delta.enableExpiredLogCleanup": "false",
    "delta.logRetentionDuration": "interval 36500 days",
    "delta.deletedFileRetentionDuration": "interval 36500 days",
}


def missing_protection(table: SealedTable) -> dict[str, str | None]:
    """The properties that are not as they were at the table's creation, and what they are now."""
    found = table.handle().metadata().configuration
    return {name: found.get(name) for name, value in PROTECTION.items() if found.get(name) != value}


def restore_protection(table: SealedTable) -> None:
    """Set them again. Commits that race with this one look again and succeed.

    Raises:
        StorageError: the commit could not be written.
    """

    def attempt() -> None:
        handle = table.handle()
        wrong = {
            name: value
            for name, value in PROTECTION.items()
            if handle.metadata().configuration.get(name) != value
        }
        if wrong:
            handle.alter.set_table_properties(wrong)

    attempted(table.uri, "restoring the table's properties", attempt)
