"""The loader: from pointers to batches of rebuilt sequences, just before the model needs them.

plan.py         which users' examples are read together, in which order, by which rank
materialize.py  one unit: read pointers and histories once, check them, know every range
batch.py        what a training step gets
graph.py        the torchdata graph: plan -> read in parallel -> cut into batches -> prefetch
loader.py       SequenceLoader, which owns the epochs and the position within one
"""

from vlm_dagster.loaders.batch import Batch, JaggedSequence
from vlm_dagster.loaders.loader import SequenceLoader

__all__ = ["Batch", "JaggedSequence", "SequenceLoader"]
