"""Sealed tables: Delta tables whose windows are written once. Histories and pointers are both one.

    rows -> sorted files (files.py) -> one commit under the window's lock (table.py)
                                           |
    state at a version <- application transactions in the log (log.py)

A sealed table is partitioned by (`segment`, `bucket`), each file sorted by (user, time, id), with an
index of its users in the footer.
"""

from vlm_dagster.sealed.files import StagedFile, UserIndex
from vlm_dagster.sealed.log import SealedWindow, TableState
from vlm_dagster.sealed.table import Sealed, SealedTable, StagedWindow, TableSpec
from vlm_dagster.sealed.verify import VerifyReport

__all__ = [
    "Sealed",
    "SealedTable",
    "SealedWindow",
    "StagedFile",
    "StagedWindow",
    "TableSpec",
    "TableState",
    "UserIndex",
    "VerifyReport",
]
