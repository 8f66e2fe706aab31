"""Sealed tables: Delta tables whose windows are written once. Histories and pointers are both one.

    spec.py       what a table is declared to hold        opening.py    the Delta table behind it
    incoming.py   what users hand over, checked           duplicates.py the policy for repeated ids
    staging.py    sorted rows -> files in place           writer.py, users.py   one file, its index
    commit.py     one transaction, under the window's lock; handles.py, attempts.py: how it is tried
    layout.py     files replaced by others: compaction, erasure, dropping, corrections
    gone.py       what left since                         retired.py    versions not kept any more
    lifetimes.py  from when to when the log names a file  sidecar.py    small files that it refers to
    log.py        what is sealed at a version             versions.py   which version sealed what
    reader.py     rows and columns of one file            table.py      all of it, as one table
    owner.py      what histories and pointer datasets have in common
    verify.py     are the files what was sealed?          sweep.py      what killed processes left

A sealed table is partitioned by (`segment`, `bucket`). The rows of a file lie by user, time and id, those
of histories in recency bands (stripes.py), with an index of its users in the footer.
"""

from vlm_dagster.sealed.commit import Sealed, commit_window
from vlm_dagster.sealed.log import SealedWindow, TableState
from vlm_dagster.sealed.spec import TableSpec
from vlm_dagster.sealed.staging import StagedWindow
from vlm_dagster.sealed.table import SealedTable
from vlm_dagster.sealed.users import Extreme, UserIndex
from vlm_dagster.sealed.verify import VerifyReport
from vlm_dagster.sealed.writer import StagedFile

__all__ = [
    "Extreme",
    "Sealed",
    "SealedTable",
    "SealedWindow",
    "StagedFile",
    "StagedWindow",
    "TableSpec",
    "TableState",
    "UserIndex",
    "VerifyReport",
    "commit_window",
]
