"""Pointer datasets: training examples that name a stretch of history instead of copying it.

requests -> validate.py -> (by bucket, sorted) -> build.py -> sealed files -> dataset.py

spec.py: what a dataset is declared to hold   snapshot.py: pinned windows
spans.py, checksum.py: the events behind pointers, for building and for checking them
"""

from vlm_dagster.pointers.checksum import RangeSums
from vlm_dagster.pointers.dataset import PointerDataset
from vlm_dagster.pointers.snapshot import PointerRef, PointerSnapshot
from vlm_dagster.pointers.spec import PointerSpec

__all__ = [
    "PointerDataset",
    "PointerRef",
    "PointerSnapshot",
    "PointerSpec",
    "RangeSums",
]
