"""How long the first batch takes in a fresh process, at the start and at a saved place, with 1,000 files of
history. Imports are done before the clock starts, and timed by themselves."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from benchmarks.loader_data import BATCH, TRAITS, Data, Shape

__all__ = ["build", "first_batch"]

# 1,000 files: 125 windows of 8 buckets, or 25 of 40, which are sealed sooner.
_FULL = Shape(200, 6_250, 16, 4096, num_days=125, num_buckets=8)
_QUICK = Shape(200, 6_250, 16, 4096, num_days=25, num_buckets=40)


def build(folder: str, quick: bool) -> dict[str, Any]:
    """The table, and a state in the middle of an epoch."""
    data = Data(Path(folder), _QUICK if quick else _FULL)
    loader = _loader(data.pointers_uri)
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    Path(folder, "state.json").write_text(json.dumps(loader.state_dict()))
    files = data.snapshot().files().num_rows
    return {"files": files, "pointers": data.pointers_uri}


def first_batch(folder: str, pointers: str, resume: bool) -> dict[str, Any]:
    """Seconds to open what is pinned, plan, and have a batch; for a fresh process."""
    start = time.perf_counter()
    import torch  # noqa: F401

    import vlm_dagster.loaders  # noqa: F401

    imported = time.perf_counter()
    loader = _loader(pointers)
    if resume:
        loader.load_state_dict(json.loads(Path(folder, "state.json").read_text()))
    opened = time.perf_counter()
    batch = next(iter(loader))
    done = time.perf_counter()
    assert batch.batch_size == BATCH
    return {"import_s": imported - start, "open_s": opened - imported, "seconds": done - imported}


def _loader(pointers: str) -> Any:
    from vlm_dagster import PointerDataset, Projection, SequenceLoader

    return SequenceLoader(
        PointerDataset.open(pointers).ref(), {"events": Projection(TRAITS, max_length=4096)}, BATCH
    )
