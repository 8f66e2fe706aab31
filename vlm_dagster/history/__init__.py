"""History tables: every event of a feature group once, in immutable, versioned windows.

events -> validate.py -> (by bucket, sorted) -> duplicates.py -> sealed files -> store.py
snapshot.py: a table at one version   arena.py: users' histories in memory
filling.py: how they get there   buffers.py: the memory, used again
rewrite.py: rows written anew, for compaction.py, erasure.py and correction.py   dropping.py: by age
"""

from vlm_dagster.history.arena import Histories
from vlm_dagster.history.buffers import ArenaBuffers
from vlm_dagster.history.snapshot import PinOpener, Snapshot, SnapshotRef
from vlm_dagster.history.store import HistoryStore
from vlm_dagster.sealed.stripes import choose_edges

__all__ = [
    "ArenaBuffers",
    "Histories",
    "HistoryStore",
    "PinOpener",
    "Snapshot",
    "SnapshotRef",
    "choose_edges",
]
