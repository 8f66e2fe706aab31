"""Units read by other processes: decoding then shares no interpreter with the training loop.

A worker is a new interpreter that imports this package and nothing of the caller's: nothing is
forked, and no script needs an `if __name__ == "__main__"`. Requests and answers go over a socket, units
through shared memory, in which the arrays lie as the caller gets them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from concurrent.futures import Future
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.spawn import get_executable

import pyarrow as pa

from vlm_dagster.errors import SchemaError, StorageError, WorkerError
from vlm_dagster.loaders.materialize import UnitData
from vlm_dagster.loaders.packing import unpack
from vlm_dagster.loaders.plan import Unit
from vlm_dagster.loaders.shared import Borrower, shared_file
from vlm_dagster.loaders.sources import ReadSpec
from vlm_dagster.loaders.worker import Answer, Request

__all__ = ["ProcessSource"]

_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); "
    "from vlm_dagster.loaders.worker import main; main()"
)
# A killed process is gone within milliseconds, unless the system itself holds it up.
_GONE_S = 5.0


class ProcessSource:
    """Reads units in processes of its own.

    `read` may be called from many threads; as many units are read at the same time as there are
    workers; with more threads than workers, these need not wait for the next request. A unit's memory is used again once
    nothing refers to its arrays. A worker that dies fails what it was asked for, and the next read
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
        self._workers: list[_Worker] = []
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
        with self._lock:  # nobody starts another one meanwhile
            self._finalizer()

    def _start_missing(self) -> None:
        if not self._finalizer.alive:
            raise _closed()
        gone = [worker for worker in self._workers if not worker.is_alive]
        self._bytes_of_gone += sum(worker.bytes_read for worker in gone)
        self._workers[:] = [worker for worker in self._workers if worker not in gone]
        while len(self._workers) < self._num_workers:
            self._workers.append(_Worker(self._spec))


def _end(workers: list[_Worker], process_id: int) -> None:
    """Takes no lock: the garbage collector may call it, in any thread."""
    if os.getpid() != process_id:
        return  # a forked child drops its copy
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()


_Found = tuple[pa.Buffer, bytes]
"""The bytes of a unit, and what is wrong with it, pickled."""


class _Worker:
    """The parent's end of one worker."""

    def __init__(self, spec: bytes) -> None:
        opened = contextlib.ExitStack()
        try:
            self._memory = shared_file()
            opened.callback(os.close, self._memory)
            mine, theirs = Pipe()
            opened.callback(mine.close)
            opened.callback(theirs.close)
            arguments = [str(n) for n in (theirs.fileno(), self._memory, os.getpid())]
            arguments.append(json.dumps([path for path in sys.path if isinstance(path, str)]))
            self._process = subprocess.Popen(
                # -P: or it would import what lies in the working directory.
                [get_executable(), "-P", "-c", _CODE, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), self._memory),
                process_group=0,  # Ctrl-C at the terminal is the parent's business
            )
        except OSError as error:
            opened.close()
            raise StorageError(
                "this machine", "starting a process that reads units", error, writing=False
            ) from error
        opened.pop_all()
        theirs.close()
        self.process_id = self._process.pid
        self._connection = mine
        self._blocks = Borrower(self._memory)
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._waiting: dict[int, tuple[Unit, Future[_Found]]] = {}
        self._killed = False
        self.is_alive = True
        self.bytes_read = 0
        self._send(spec)
        self._listener = threading.Thread(
            target=self._listen, name=f"vlm-worker-{self.process_id}", daemon=True
        )
        self._listener.start()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def expect(self, unit: Unit) -> tuple[int, Future[_Found]]:
        """A number to ask by, and the unit, once it is there."""
        future: Future[_Found] = Future()
        number = next(self._numbers)
        with self._lock:
            if self.is_alive:
                self._waiting[number] = unit, future
            else:
                future.set_exception(self._why(unit))
        return number, future

    def ask(self, number: int, unit: Unit, user_ids: pa.Array, verify: bool) -> None:
        """Ask for what is expected."""
        # Joined: a slice would be pickled with all that it is a slice of.
        users = pa.concat_arrays([user_ids])
        self._send(pickle.dumps(Request(number, unit, users, verify, self._blocks.take_returned())))

    def _send(self, message: bytes) -> None:
        # If it fails the worker is dead, and the listener tells everybody.
        with self._sending, contextlib.suppress(OSError):
            self._connection.send_bytes(message)

    def _listen(self) -> None:
        try:
            while True:
                self._pass_on(pickle.loads(self._connection.recv_bytes()))
        except (EOFError, OSError):
            pass
        finally:
            self._bury()

    def _bury(self) -> None:
        """It closed its end, so it is as good as gone: tell those who wait."""
        try:
            self._process.wait(_GONE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with self._lock:
            self.is_alive = False
            waiting = list(self._waiting.values())
            self._waiting.clear()
        for unit, future in waiting:
            future.set_exception(self._why(unit))
        self._connection.close()
        os.close(self._memory)

    def _pass_on(self, answer: Answer) -> None:
        with self._lock:
            _, future = self._waiting.pop(answer.number)
            self.bytes_read = max(self.bytes_read, answer.bytes_read or 0)
        try:
            if answer.block is None:
                raise pickle.loads(answer.error)
            memory = self._blocks.borrow(answer.block, answer.num_bytes)
        except BaseException as error:  # whatever it is, somebody waits for it
            future.set_exception(error)
        else:
            future.set_result((memory, answer.flaws))

    def _why(self, unit: Unit) -> WorkerError:
        if self._killed:
            return _closed()
        code = self._process.returncode
        how = f"ended with exit code {code}"
        way_out = "What it wrote to stderr says why."
        if code is not None and code < 0:
            how = f"was killed by {_name_of(-code)}"
            way_out = (
                "Mostly the system does that when memory runs out: use a smaller events_per_unit or "
                "num_workers. The loader's state is whole, so go on from there."
            )
        return WorkerError(
            f"process {self.process_id}, which read users [{unit.first_user}, {unit.end_user}) of "
            f"bucket {unit.bucket}, {how}",
            way_out,
            exit_code=code,
        )

    def kill(self) -> None:
        self._killed = True
        self._process.kill()

    def join(self) -> None:
        if threading.current_thread() is not self._listener:
            self._listener.join(_GONE_S)


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have no name
        return f"signal {number}"


def _closed() -> WorkerError:
    return WorkerError("it was closed while units were read", "Make a new one to go on.")
