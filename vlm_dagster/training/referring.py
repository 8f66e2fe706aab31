"""A training run enters its checkpoint's folder in every table that it reads, before it begins.

So what the run reads, and what its checkpoint will pin, is kept from then on. A run that ends without
a checkpoint takes its entries back; one that is killed leaves them, and what it read is held until
its folder is forgotten (`vlm-dagster gc --forget FOLDER`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_dagster.history import HistoryStore
from vlm_dagster.pointers import PointerDataset, PointerRef
from vlm_dagster.retention.referrers import Referrer, register, unregister
from vlm_dagster.sealed import SealedTable
from vlm_dagster.training.checkpoint import MANIFEST
from vlm_dagster.training.config import TrainingConfig

__all__ = ["referring"]


@contextlib.contextmanager
def referring(config: TrainingConfig) -> Iterator[None]:
    """While this is open, and as long as a checkpoint is in its folder, the pinned versions are kept.

    Raises:
        TableError: a table cannot be written, and the folder is not entered in it yet.
    """
    roles = {"train": config.train_pointers, "eval": config.eval_pointers}
    refs = {role: PointerRef.from_json(pin) for role, pin in roles.items() if pin is not None}
    pins: dict[str, Any] = {role: ref.to_json() for role, ref in refs.items()}
    referrer = Referrer.checkpoint(config.checkpoint_dir, pins)
    entered = [table for table in _tables(refs) if register(table, referrer)]
    try:
        yield
    finally:
        if not Path(config.checkpoint_dir, MANIFEST).exists():
            for table in entered:
                unregister(table, referrer)


def _tables(refs: dict[str, PointerRef]) -> Iterator[SealedTable]:
    for uri in dict.fromkeys(ref.uri for ref in refs.values()):
        yield PointerDataset.open(uri).sealed_table
    for uri in dict.fromkeys(pin.uri for ref in refs.values() for pin in ref.pins):
        yield HistoryStore.open(uri).sealed_table
