"""Stand-ins for pools in memory and for who reads them, and the graph's nodes over these."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from test_schedule import listed
from torchdata.nodes import BaseNode, ParallelMapper

from vlm_dagster import Batch
from vlm_dagster.loaders import graph
from vlm_dagster.loaders.graph import Failure, ReadAhead, Ready, Steps, Stop, epoch_graph
from vlm_dagster.loaders.report import Meter
from vlm_dagster.loaders.steps import Share, Step


class Part:
    """Stands for a unit in memory."""

    def __init__(self, unit: int) -> None:
        self.unit = unit


class Whole:
    """Stands for a pool in memory."""

    def __init__(self, pool: int, parts: Sequence[Part]) -> None:
        self.pool = pool
        self.parts = [part.unit for part in parts]


class Reader:
    """Reads pools of two units each, and remembers which are in memory.

    Args:
        before: called before each unit is read, with its number.
    """

    def __init__(self, before: Callable[[int], None] = lambda unit: None) -> None:
        self._before = before
        self.parts: weakref.WeakSet[Part] = weakref.WeakSet()
        self.pools: weakref.WeakSet[Whole] = weakref.WeakSet()
        self.read_units: list[int] = []

    def units(self, pool: int) -> list[int]:
        return [2 * pool, 2 * pool + 1]

    def read(self, unit: int) -> Any:
        self.read_units.append(unit)
        self._before(unit)
        found = Part(unit)
        self.parts.add(found)
        return found

    def joined(self, pool: int, units: Sequence[Any]) -> Any:
        found = Whole(pool, units)
        self.pools.add(found)
        return found

    def in_memory(self) -> set[int]:
        return {found.pool for found in list(self.pools)}


def form(ready: Ready) -> Batch:
    for pool, found in ready.pools.items():
        assert isinstance(found, Whole)
        assert (found.pool, found.parts) == (pool, [2 * pool, 2 * pool + 1])
    rows = [100 * pool + row for pool, row in listed(ready.step.pieces)]
    return Batch({"request_time": torch.tensor(rows, dtype=torch.int64)}, {})


def seen(item: Any) -> Any:
    """What an item of any node says, comparable."""
    if isinstance(item, Batch):
        return item.examples["request_time"].tolist()
    if isinstance(item, Failure):
        return str(item.error)
    step = item.step if isinstance(item, Ready) else item
    assert isinstance(step, Step)
    pools = {p: found.pool for p, found in item.pools.items()} if isinstance(item, Ready) else {}  # type: ignore[attr-defined]
    return step.number, listed(step.pieces), step.padding, step.done, pools


def read_ahead(share: Share, reader: Reader, workers: int, ahead: int = 3) -> ReadAhead:
    return ReadAhead(
        Steps(share), reader, num_workers=workers, ahead=ahead, stop=Stop(), meter=Meter()
    )


def forming(share: Share, reader: Reader, formers: int) -> BaseNode[Any]:
    node = read_ahead(share, reader, 1)
    return ParallelMapper(node, graph._Form(form, Meter()), num_workers=formers, method="thread")


def whole_graph(
    share: Share,
    reader: Reader,
    readers: int = 2,
    formers: int = 0,
    prefetch: int = 2,
    stop: Stop | None = None,
    former: Callable[[Ready], Batch] = form,
    device: torch.device | None = None,
) -> BaseNode[Any]:
    return epoch_graph(
        share,
        reader,
        former,
        num_readers=readers,
        num_formers=formers,
        ahead=3,
        prefetch=prefetch,
        pin_memory=False,
        device=device,
        stop=Stop() if stop is None else stop,
        meter=Meter(),
    )
