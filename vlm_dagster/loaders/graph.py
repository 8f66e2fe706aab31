"""The torchdata graph of one epoch, stage by stage:

    Steps      the plan: which rows of which pools make up each batch of this reader
    ReadAhead  the pools that a step needs, read in parallel ahead of it
    form       rows of pools to a batch (a mapper, in threads or in line)
    pin, prefetch, device

This is the only module that knows torchdata. Every stage is a node with a position of its own that
can be saved at any item and gone on from; a stage is replaced by giving `epoch_graph` another function,
or by building another graph of these nodes.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torchdata.nodes import BaseNode, ParallelMapper, PinMemory, Prefetcher

from vlm_dagster.loaders.batch import Batch
from vlm_dagster.loaders.materialize import UnitData
from vlm_dagster.loaders.pool import PoolData
from vlm_dagster.loaders.report import Meter
from vlm_dagster.loaders.steps import Share, Step

__all__ = ["Failure", "PoolReader", "ReadAhead", "Ready", "Steps", "Stop", "epoch_graph", "run"]

# Steps looked at ahead of the one that is due; beyond pools are what bounds it.
_MOST_STEPS_AHEAD = 1024


# How long threads get to come back from native code when Python ends.
_EXIT_SECONDS = 0.5
_READ_THREAD = "vlm-read"


class Stop:
    """Says, in any thread, that the consumer has gone; runs what is to be done then."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._closers: list[Callable[[], None]] = []

    def __bool__(self) -> bool:
        return self._event.is_set()

    def then(self, close: Callable[[], None]) -> None:
        self._closers.append(close)

    def set(self) -> None:
        self._event.set()
        while self._closers:
            self._closers.pop()()


class PoolReader(Protocol):
    """How pools get into memory. `read` is called in several threads at once."""

    def units(self, pool: int) -> Sequence[int]:
        """The numbers of a pool's units."""

    def read(self, unit: int) -> UnitData | None:
        """One unit; None if it is left out."""

    def joined(self, pool: int, units: Sequence[UnitData | None]) -> PoolData:
        """A pool of its units."""


@dataclass(frozen=True)
class Failure:
    """An error on its way to the consumer. torchdata would rebuild it from its text alone."""

    error: BaseException


@dataclass(frozen=True)
class Ready:
    """A step, and the pools that it takes its examples from."""

    step: Step
    pools: dict[int, PoolData]


class Steps(BaseNode[Step]):  # type: ignore[misc]
    """A reader's steps, in order."""

    def __init__(self, share: Share, first: int = 0) -> None:
        super().__init__()
        self._share = share
        self._first = first
        self._next = first

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self._next = self._first if initial_state is None else initial_state["step"]

    def next(self) -> Step:
        if self._next >= self._share.num_steps:
            raise StopIteration
        step = self._share.step(self._next)
        self._next += 1
        return step

    def get_state(self) -> dict[str, Any]:
        return {"step": self._next}


class _Workers:
    """Daemon threads that run functions in order of submission. Python would wait for others at its
    end, also for one that storage keeps waiting."""

    def __init__(self, num_threads: int) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
        self._queue = queue.SimpleQueue()
        self.num_threads = num_threads
        _WORKERS.add(self)
        for number in range(num_threads):
            threading.Thread(
                target=_work, args=(self._queue,), name=f"{_READ_THREAD}-{number}", daemon=True
            ).start()

    def submit(self, function: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        if self.num_threads:
            self._queue.put((future, function))
        else:
            _run(future, function)
        return future

    def close(self) -> None:
        """Ends the threads after what they are doing; what has not begun is dropped."""
        try:
            while True:
                self._queue.get_nowait()
        except queue.Empty:
            pass
        for _ in range(self.num_threads):
            self._queue.put(None)


_WORKERS: weakref.WeakSet[_Workers] = weakref.WeakSet()


@atexit.register
def _let_threads_come_back() -> None:
    """Python ends its daemon threads when they come back from native code, which C++ answers with an
    abort of the whole process: so those that are not kept waiting by storage end before."""
    for workers in list(_WORKERS):
        workers.close()
    deadline = time.monotonic() + _EXIT_SECONDS
    for thread in threading.enumerate():
        if thread.name.startswith(_READ_THREAD):
            thread.join(max(deadline - time.monotonic(), 0.0))


def _work(tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]) -> None:
    while (task := tasks.get()) is not None:
        _run(*task)
        del task  # or the last result would stay in memory until the next one


def _run(future: Future[Any], function: Callable[[], Any]) -> None:
    try:
        future.set_result(function())
    except BaseException as error:  # a panic of native code is no Exception, and is waited for too
        future.set_exception(error)


class ReadAhead(BaseNode[Ready | Failure]):  # type: ignore[misc]
    """Adds to each step the pools that it needs. They are read in the order in which steps first need
    them, while earlier steps are under way, and let go after the last step that needs them.

    Args:
        source: the steps.
        reader: reads the units of a pool, each a task by itself.
        num_workers: threads that read; 0 reads when a step is due, in the caller's thread.
        ahead: pools that may be read, or being read, before a step needs them.
        stop: ends waiting and the threads, from another thread.
    """

    def __init__(
        self,
        source: BaseNode[Step],
        reader: PoolReader,
        *,
        num_workers: int,
        ahead: int,
        stop: Stop,
        meter: Meter,
    ) -> None:
        super().__init__()
        self._source = source
        self._reader = reader
        self._num_workers = num_workers
        self._ahead = ahead if num_workers else 0
        self._stop = stop
        self._meter = meter
        self._workers: _Workers | None = None
        self._clear()

    def _clear(self) -> None:
        self._steps: deque[tuple[Step, dict[str, Any]]] = deque()
        self._coming: dict[int, list[Future[UnitData | None]]] = {}
        self._here: dict[int, PoolData] = {}
        self._exhausted = False

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self.close()
        self._clear()
        self._source.reset(None if initial_state is None else initial_state["source"])
        self._state = self._source.state_dict()
        self._workers = _Workers(self._num_workers)
        self._stop.then(self._workers.close)

    def close(self) -> None:
        """Ends the threads; what they are reading just now is thrown away."""
        if self._workers is not None:
            self._workers.close()

    def __del__(self) -> None:
        self.close()

    def get_state(self) -> dict[str, Any]:
        return {"source": self._state}

    def next(self) -> Ready | Failure:
        if self._stop:
            self._end()
        self._look_ahead(at_least_one=True)
        if not self._steps:
            raise StopIteration
        step, state = self._steps.popleft()
        needed = dict.fromkeys(step.pieces.pool.tolist())
        try:
            for pool in needed:
                if pool not in self._here:
                    self._here[pool] = self._wait_for(pool)
                    self._look_ahead()
        except _StoppedError:
            self._end()
            raise StopIteration from None
        except BaseException as error:
            self._end()
            return Failure(error)
        ready = Ready(step, {pool: self._here[pool] for pool in needed})
        for pool in step.done:
            del self._here[pool]
        self._state = state
        return ready

    def _end(self) -> None:
        """Lets go of everything: whoever keeps an error, or the end of iteration, keeps this node."""
        self._clear()
        self._exhausted = True

    def _look_ahead(self, *, at_least_one: bool = False) -> None:
        while not self._exhausted and len(self._steps) < _MOST_STEPS_AHEAD:
            if len(self._coming) >= self._ahead and (self._steps or not at_least_one):
                return
            try:
                step = next(self._source)
            except StopIteration:
                self._exhausted = True
                return
            self._steps.append((step, self._source.state_dict()))
            for pool in dict.fromkeys(step.pieces.pool.tolist()):
                if pool not in self._here and pool not in self._coming:
                    self._coming[pool] = self._submit(pool)

    def _submit(self, pool: int) -> list[Future[UnitData | None]]:
        assert self._workers is not None
        return [
            self._workers.submit(_Task(self._reader, unit, self._meter))
            for unit in self._reader.units(pool)
        ]

    def _wait_for(self, pool: int) -> PoolData:
        begin = time.perf_counter()
        try:
            units = []
            # What was let go is read anew where it fills up the end of an epoch.
            futures = self._coming.pop(pool, None) or self._submit(pool)
            for future in futures:
                while not wait([future], timeout=0.1).done:
                    if self._stop:
                        raise _StoppedError
                units.append(future.result())
            return self._reader.joined(pool, units)
        finally:
            self._meter.waited("read", time.perf_counter() - begin)


class _StoppedError(Exception):
    """The consumer has gone."""


@dataclass(frozen=True)
class _Task:
    reader: PoolReader
    unit: int
    meter: Meter

    def __call__(self) -> UnitData | None:
        with self.meter.busy("read"):
            return self.reader.read(self.unit)


@dataclass(frozen=True)
class _Form:
    """The map function of the forming stage; errors travel as values."""

    form: Callable[[Ready], Batch]
    meter: Meter

    def __call__(self, ready: Ready | Failure) -> Batch | Failure:
        if isinstance(ready, Failure):
            return ready
        try:
            with self.meter.busy("form"):
                return self.form(ready)
        except BaseException as error:
            return Failure(error)


@dataclass(frozen=True)
class _Move:
    device: torch.device

    def __call__(self, batch: Batch | Failure) -> Batch | Failure:
        return batch if isinstance(batch, Failure) else batch.to(self.device, non_blocking=True)


def epoch_graph(
    share: Share,
    reader: PoolReader,
    form: Callable[[Ready], Batch],
    *,
    num_readers: int,
    num_formers: int,
    ahead: int,
    prefetch: int,
    pin_memory: bool,
    device: torch.device | None,
    stop: Stop,
    meter: Meter,
) -> BaseNode[Batch | Failure]:
    """The graph of (the rest of) an epoch.

    Args:
        share: the steps of this reader.
        num_readers: threads that read and decode; 0 reads in the thread that forms.
        num_formers: threads that form batches; 0 forms in the thread that prefetches, or the
            consumer's.
        ahead: pools read before they are needed.
        prefetch: batches ready ahead of the consumer; 0 for none.
        stop: set by `run` when the consumer has gone.
    """
    node: BaseNode[Any] = Steps(share)
    node = ReadAhead(node, reader, num_workers=num_readers, ahead=ahead, stop=stop, meter=meter)
    node = ParallelMapper(node, _Form(form, meter), num_workers=num_formers, method="thread")
    if pin_memory:
        node = PinMemory(node)
    if prefetch:
        node = Prefetcher(node, prefetch)
    if device is not None:
        node = ParallelMapper(node, _Move(device), num_workers=0)
    return node


def run(node: BaseNode[Batch | Failure], stop: Stop) -> Iterator[Batch]:
    """Go over a graph once; errors come out as they were raised."""
    try:
        node.reset()
        item: Batch | Failure | None
        for item in node:
            if isinstance(item, Failure):
                break
            # Not kept while the next one is formed: its memory is to be used again.
            handed, item = [item], None
            yield handed.pop()
        else:
            return
        error, item = item.error, None
        try:
            raise error
        finally:
            del error  # or it would keep this frame, which keeps it
    finally:
        stop.set()
        del node  # whoever keeps the error keeps this frame, which must not keep the threads
