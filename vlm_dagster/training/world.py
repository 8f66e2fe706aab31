"""The ranks of a run: one process alone, or those that torchrun started (gloo or NCCL)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from vlm_dagster.cores import num_cores
from vlm_dagster.errors import TrainingError

__all__ = ["World", "open_world"]


@dataclass(frozen=True)
class World:
    """This process among the ranks of the run.

    Attributes:
        rank: 0-based.
        size: number of ranks.
        device: where this rank computes.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def all_sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all ranks; every rank must call it."""
        if self.size == 1:
            return values
        moved = values.to(self.device, copy=True)
        dist.all_reduce(moved)
        return moved.to(values.device)

    def all_max(self, value: int) -> int:
        """The greatest `value` of all ranks; every rank must call it."""
        if self.size == 1:
            return value
        moved = torch.tensor(value, device=self.device)
        dist.all_reduce(moved, op=dist.ReduceOp.MAX)
        return int(moved)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.all_max(0)


def _choose_device(device: str, local_rank: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        found = torch.cuda.device_count()
        if local_rank >= found:
            raise TrainingError(
                f"rank {local_rank} of this machine wants a GPU, but there are {found}",
                "Start at most one process a GPU, or train with device='cpu'.",
            )
        return torch.device("cuda", local_rank)
    return torch.device(device)


@contextlib.contextmanager
def open_world(
    device: str = "auto", *, num_threads: int | None = None, timeout_s: float = 600
) -> Iterator[World]:
    """Join the ranks that torchrun started, or be alone; sets torch's CPU threads meanwhile.

    Args:
        device: "auto", "cpu" or "cuda".
        num_threads: CPU threads for torch in this process; None shares the usable cores out
            evenly among the ranks of this machine (torchrun alone would give each just one).
        timeout_s: how long a rank waits for the others before it fails.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = _choose_device(device, local_rank)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads or max(1, num_cores() // local_size))
    try:
        if size == 1:
            yield World(device=chosen)
            return
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        try:
            yield World(dist.get_rank(), dist.get_world_size(), chosen)
        finally:
            dist.destroy_process_group()
    finally:
        torch.set_num_threads(threads_before)
