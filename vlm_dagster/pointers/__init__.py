"""Pointer datasets: training examples that name a stretch of history instead of copying it.

requests -> validate.py -> (engine sorts) -> build.py -> sealed files -> dataset.py
"""

from vlm_dagster.pointers.checksum import checksum_of_ranges
from vlm_dagster.pointers.dataset import PointerDataset
from vlm_dagster.pointers.snapshot import PointerRef, PointerSnapshot
from vlm_dagster.pointers.spec import PointerSpec

__all__ = [
    "PointerDataset",
    "PointerRef",
    "PointerSnapshot",
    "PointerSpec",
    "checksum_of_ranges",
]
