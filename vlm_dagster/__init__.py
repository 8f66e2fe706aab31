"""Versioned late materialization for recommender training.

Events are stored once, in immutable, versioned Delta history tables; a training example is a pointer
into a pinned version; the loader rebuilds its sequence just before the model needs it.
"""

from typing import TYPE_CHECKING, Any

from vlm_dagster.errors import VlmError
from vlm_dagster.history import Histories, HistoryStore, Snapshot, SnapshotRef
from vlm_dagster.pointers import PointerDataset, PointerRef, PointerSnapshot, PointerSpec
from vlm_dagster.schema import FeatureGroup, Projection, Trait
from vlm_dagster.sealed import Sealed, StagedWindow
from vlm_dagster.windows import Window, WindowGrid

if TYPE_CHECKING:
    from vlm_dagster.loaders import Batch, JaggedSequence, SequenceLoader

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "FeatureGroup",
    "Histories",
    "HistoryStore",
    "JaggedSequence",
    "PointerDataset",
    "PointerRef",
    "PointerSnapshot",
    "PointerSpec",
    "Projection",
    "Sealed",
    "SequenceLoader",
    "Snapshot",
    "SnapshotRef",
    "StagedWindow",
    "Trait",
    "VlmError",
    "Window",
    "WindowGrid",
]

_NEEDS_TORCH = ("Batch", "JaggedSequence", "SequenceLoader")


def __getattr__(name: str) -> Any:
    # The core works without torch, and importing torch takes seconds.
    if name in _NEEDS_TORCH:
        from vlm_dagster import loaders

        return getattr(loaders, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
