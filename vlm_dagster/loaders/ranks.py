"""Which of several readers this process is: rank of a distributed run, worker of a DataLoader."""

from __future__ import annotations

import os

import torch.distributed as dist
from torch.utils.data import get_worker_info

from vlm_dagster.errors import SchemaError

__all__ = ["is_worker", "rank_of_process", "worker_of_process"]


def rank_of_process() -> tuple[int, int]:
    """Rank and number of ranks: those of torch.distributed, or those that torchrun names in the
    environment, or 0 of 1.

    Raises:
        SchemaError: the environment names no ranks that could be.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdigit() and size.isdigit()) or int(rank) >= int(size):
        raise SchemaError(
            f"the environment names RANK={rank!r} and WORLD_SIZE={size!r}",
            "Start with torchrun, or pass rank and world_size.",
        )
    return int(rank), int(size)


def is_worker() -> bool:
    """Whether this process is a worker of a DataLoader."""
    return get_worker_info() is not None


def worker_of_process() -> tuple[int, int]:
    """Number and count of the DataLoader's workers, if this process is one of them, or 0 of 1."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
