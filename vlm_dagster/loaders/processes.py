"""Units read by other processes: decoding then shares no interpreter with the training loop.

A worker is a new interpreter that imports this package and nothing of the caller's: nothing is
forked, and no script needs an `if __name__ == "__main__"`. Requests and answers go over a socket, units
through shared memory, in which the arrays lie as the caller gets them.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import weakref
from dataclasses import replace

import pyarrow as pa

from vlm_dagster.errors import SchemaError, WorkerError
from vlm_dagster.loaders.materialize import UnitData
from vlm_dagster.loaders.packing import unpack
from vlm_dagster.loaders.plan import Unit
from vlm_dagster.loaders.reader_process import ReaderProcess, closed_error
from vlm_dagster.loaders.sources import ReadSpec

__all__ = ["ProcessSource"]


class ProcessSource:
    """Reads units in processes of its own.

    `read` may be called from many threads. As many units are read at the same time as there are
    workers; with more threads than that, these need not wait for the next request. A unit's memory is
    used again once nothing refers to its arrays. A worker that dies fails what it was asked for, and the next read
    starts another in its place.

    A source belongs to the process that made it, and works in any: also in a daemonic one, a
    DataLoader's worker say.

    Args:
        spec: what to read. It goes to the workers with its credentials, over the socket.
        num_workers: processes. They start with the first read: a cache may need none.

    Raises:
        SchemaError: `num_workers` is not 1 or more, or the system has no such sockets.
    """

    def __init__(self, spec: ReadSpec, num_workers: int) -> None:
        if isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 1:
            raise SchemaError(
                f"num_workers={num_workers!r} with workers='processes'",
                "Use an integer of 1 or more.",
            )
        if sys.platform == "win32":
            raise SchemaError(
                "workers='processes' needs to pass descriptors to a process, which Windows has not",
                "Use workers='threads'.",
            )
        self._spec = pickle.dumps(spec)
        self._num_workers = num_workers
        self._lock = threading.Lock()
        self._workers: list[ReaderProcess] = []
        self._bytes_of_gone = 0
        self._process_id = os.getpid()
        self._finalizer = weakref.finalize(self, _end, self._workers, self._process_id)

    def start(self) -> None:
        """Start the workers now, some 0.3 s before they read, rather than when a unit is asked for.

        Raises:
            WorkerError: this source is closed.
            StorageError: a process could not be started.
        """
        with self._lock:
            self._start_missing()

    @property
    def process_ids(self) -> list[int]:
        """Of the workers that are alive."""
        with self._lock:
            return [worker.process_id for worker in self._workers if worker.is_alive]

    def read(self, unit: Unit, user_ids: pa.Array, *, verify: bool) -> UnitData:
        """As `UnitSource.read`; errors come out as a worker raised them.

        Raises:
            WorkerError: the worker died, or this source is closed.
            StorageError: a process could not be started, or storage refused.
        """
        if os.getpid() != self._process_id:
            raise WorkerError(
                f"process {os.getpid()} was forked while process {self._process_id} had a loader "
                f"with reading processes open, which answer that one only",
                "Make the loader in the process that iterates over it.",
            )
        with self._lock:
            self._start_missing()
            worker = min(self._workers, key=lambda one: one.num_waiting)
            number, future = worker.expect(unit)
        # Not under the lock: a worker that does not listen must not hold up the others, nor `close`.
        worker.ask(number, unit, user_ids, verify)
        memory, flaws = future.result()
        found = unpack(memory)
        if flaws:
            kept, bad = pickle.loads(flaws)
            found = replace(found, kept=kept, bad=bad)
        return found

    @property
    def bytes_read(self) -> int:
        """As `UnitSource.bytes_read`, of all workers so far."""
        with self._lock:
            return self._bytes_of_gone + sum(worker.bytes_read for worker in self._workers)

    def close(self) -> None:
        """End all workers, whatever they are reading. Who waits for a unit gets a WorkerError."""
        if os.getpid() != self._process_id:
            return
        for worker in list(self._workers):  # before anything is waited for
            worker.kill()
        with self._lock:  # nobody starts another one meanwhile
            self._finalizer()

    def _start_missing(self) -> None:
        if not self._finalizer.alive:
            raise closed_error()
        gone = [worker for worker in self._workers if not worker.is_alive]
        self._bytes_of_gone += sum(worker.bytes_read for worker in gone)
        self._workers[:] = [worker for worker in self._workers if worker not in gone]
        while len(self._workers) < self._num_workers:
            self._workers.append(ReaderProcess(self._spec))


def _end(workers: list[ReaderProcess], process_id: int) -> None:
    """Takes no lock: the garbage collector may call it, in any thread."""
    if os.getpid() != process_id:
        return  # a forked child drops its copy
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
