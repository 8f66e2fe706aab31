"""The loader: from pointers to batches of rebuilt sequences, just before the model needs them.

What there is to read:
    pins.py         which snapshots the pointers are resolved in
    readable.py     which examples can still be rebuilt, where events are gone
    options.py      what decides which batches an epoch has, as a value
    plan.py         which users are read together (units), and shuffled together (pools, in lanes)
    lengths.py      how long examples are, from the pointers alone

In which order it comes:
    schedule.py     which rows of which pools make up each batch of an epoch
    epochs.py       the schedule of each epoch
    steps.py        one reader's share of it, and its uneven end
    state.py        a place in it, as JSON
    ranks.py        which of several readers this process is

How it is read:
    materialize.py  one unit: read pointers and histories once, check them, know every range
    sources.py      where units come from: read right here, or
    processes.py    by other processes (reader_process.py, worker.py, shared.py, packing.py), or
    cache.py        from a local folder (cache_folder.py, cache_facts.py, cache_file.py, packing.py)
    reading.py      the pools of an epoch; what happens to damaged examples
    pool.py         a pool in memory, and the order its examples come in

What comes out:
    forming.py      the examples that a step names, as a batch
    forms.py        ranges of arenas as sequences of each form
    jagged.py       sequences of one group in three forms: expanded, deduplicated, views
    fills.py        what may stand where there is no event
    kjt.py          the same as TorchRec's KeyedJaggedTensor
    merging.py      several groups' sequences as one, in the order of time
    batch.py        what a training step gets

What runs it:
    graph.py        the torchdata graph: steps -> read ahead -> form -> pin -> prefetch -> device
    report.py       where the time went, and which knob to turn
    loader.py       SequenceLoader, which owns the place within an epoch

Only jagged.py, forms.py, forming.py, batch.py, kjt.py, merging.py, graph.py, ranks.py and loader.py need torch, and
importing this package imports none of them.
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
