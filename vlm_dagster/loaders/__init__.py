"""The loader: from pointers to batches of rebuilt sequences, just before the model needs them.

    pins.py         which snapshots the pointers are resolved in
    readable.py     which examples can still be rebuilt, where events are gone
    plan.py         which users' examples are read together, in which order, by which rank
    materialize.py  one unit: read pointers and histories once, check them, know every range
    forming.py      the examples at some places of a chunk, as a batch
    forms.py        ranges of arenas as sequences of each form
    jagged.py       sequences of one group in three forms: expanded, deduplicated, views
    kjt.py          the same as TorchRec's KeyedJaggedTensor
    merging.py      several groups' sequences as one, in the order of time
    batch.py        what a training step gets
    graph.py        the torchdata graph: plan -> read in parallel -> cut into batches -> prefetch
    loader.py       SequenceLoader, which owns the epochs and the position within one

The first four need Arrow and numpy only, so importing this package does not import torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_dagster.loaders.batch import Batch, JaggedSequence
    from vlm_dagster.loaders.loader import SequenceLoader

__all__ = ["Batch", "JaggedSequence", "SequenceLoader"]


def __getattr__(name: str) -> Any:
    if name == "SequenceLoader":
        from vlm_dagster.loaders.loader import SequenceLoader

        return SequenceLoader
    if name in ("Batch", "JaggedSequence"):
        from vlm_dagster.loaders import batch

        return getattr(batch, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
