"""Dagster IO managers: commit what an asset staged, load frozen handles. Never a table's content."""

from vlm_dagster.io_managers.checkpoints import VlmCheckpointIOManager
from vlm_dagster.io_managers.handles import CheckpointRef, Sealing
from vlm_dagster.io_managers.history import VlmHistoryIOManager
from vlm_dagster.io_managers.pointers import VlmPointerIOManager

__all__ = [
    "CheckpointRef",
    "Sealing",
    "VlmCheckpointIOManager",
    "VlmHistoryIOManager",
    "VlmPointerIOManager",
]
