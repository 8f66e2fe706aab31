"""The parent's end of one process that reads units (worker.py is the other)."""

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
from concurrent.futures import Future
from multiprocessing import Pipe
from multiprocessing.spawn import get_executable

import pyarrow as pa

from vlm_dagster.errors import StorageError, WorkerError
from vlm_dagster.loaders.plan import Unit
from vlm_dagster.loaders.shared import Borrower, shared_file
from vlm_dagster.loaders.worker import Answer, Request

__all__ = ["Found", "ReaderProcess", "closed_error"]

# Where to import from comes first by message: it may be longer than an argument can be.
_CODE = """
import json, os, sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
try:
    sys.path[:] = json.loads(connection.recv_bytes())
except (EOFError, OSError):
    os._exit(0)
from vlm_dagster.loaders.worker import main
main(connection)
"""
# A killed process is gone within milliseconds, unless the system itself holds it up.
_GONE_S = 5.0

Found = tuple[pa.Buffer, bytes]
"""The bytes of a unit, and what is wrong with it, pickled."""


class ReaderProcess:
    """A process that reads units, from its start to its end.

    Args:
        spec: what to read, pickled.

    Attributes:
        is_alive: whether it can be asked.
        bytes_read: as `UnitSource` has it, so far.

    Raises:
        StorageError: it could not be started. Nothing is left of it.
    """

    def __init__(self, spec: bytes) -> None:
        path = json.dumps([path for path in sys.path if isinstance(path, str)]).encode()
        self._unsent = [path, spec]
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._waiting: dict[int, tuple[Unit, Future[Found]]] = {}
        self._killed = False
        self.is_alive = True
        self.bytes_read = 0
        with contextlib.ExitStack() as opened:
            try:
                self._memory = shared_file()
                opened.callback(os.close, self._memory)
                self._connection, theirs = Pipe()
                opened.callback(self._connection.close)
                with theirs:
                    self._process = _start(theirs.fileno(), self._memory)
                opened.callback(self._process.wait)
                opened.callback(self._process.kill)
                self._blocks = Borrower(self._memory)
                self.process_id = self._process.pid
                self._listener = threading.Thread(
                    target=self._listen, name=f"vlm-worker-{self.process_id}", daemon=True
                )
                self._listener.start()
            except (OSError, RuntimeError) as error:  # RuntimeError: no more threads
                raise StorageError(
                    "this machine", "starting a process that reads units", error, writing=False
                ) from error
            opened.pop_all()

    @property
    def num_waiting(self) -> int:
        """Units that were asked for and are not there yet."""
        return len(self._waiting)

    def expect(self, unit: Unit) -> tuple[int, Future[Found]]:
        """A number to ask by, and the unit, once it is there."""
        future: Future[Found] = Future()
        number = next(self._numbers)
        with self._lock:
            if self.is_alive:
                self._waiting[number] = unit, future
            else:
                future.set_exception(self._why(unit))
        return number, future

    def ask(self, number: int, unit: Unit, user_ids: pa.Array, verify: bool) -> None:
        """Ask for what is expected. Waits for a process that does not listen, until it is killed."""
        # Joined: a slice would be pickled with all that it is a slice of.
        users = pa.concat_arrays([user_ids])
        self._send(pickle.dumps(Request(number, unit, users, verify, self._blocks.take_returned())))

    def kill(self) -> None:
        """End it, whatever it is reading. Takes no lock."""
        self._killed = True
        self._process.kill()

    def join(self) -> None:
        """Wait until it is gone and everybody who waits for a unit was told."""
        if threading.current_thread() is not self._listener:
            self._listener.join(_GONE_S)

    def _send(self, *messages: bytes) -> None:
        # If it fails the worker is dead, and the listener tells everybody.
        with self._sending, contextlib.suppress(OSError):
            for message in (*self._unsent, *messages):
                self._connection.send_bytes(message)
            self._unsent.clear()

    def _listen(self) -> None:
        try:
            self._send()  # here, because a process that has yet to start listens late
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
        finally:
            with self._lock:
                self.is_alive = False
                waiting = list(self._waiting.values())
                self._waiting.clear()
            for unit, future in waiting:
                future.set_exception(self._why(unit))
        with self._sending:  # nobody writes to what has its number next
            self._connection.close()
        os.close(self._memory)

    def _pass_on(self, answer: Answer) -> None:
        with self._lock:
            _, future = self._waiting.pop(answer.number)
            self.bytes_read = max(self.bytes_read, answer.bytes_read or 0)
        try:
            if answer.block is None:
                future.set_exception(pickle.loads(answer.error))
            else:
                memory = self._blocks.borrow(answer.block, answer.num_bytes)
                future.set_result((memory, answer.flaws))
        except OSError as error:
            doing = "taking in what a process has read"
            future.set_exception(StorageError("this machine", doing, error, writing=False))
        except BaseException as error:  # whatever it is, somebody waits for it
            future.set_exception(error)
        finally:
            del future  # or it and its error would keep each other

    def _why(self, unit: Unit) -> WorkerError:
        if self._killed:
            return closed_error()
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


def _start(socket: int, memory: int) -> subprocess.Popen[bytes]:
    # The parent's own -X, -W and the like. And -P, or it would import what lies in the working directory.
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    arguments = [str(number) for number in (socket, memory, os.getpid())]
    return subprocess.Popen(
        [get_executable(), *flags, "-P", "-c", _CODE, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=(socket, memory),
        process_group=0,  # Ctrl-C at the terminal is the parent's business
    )


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have no name
        return f"signal {number}"


def closed_error() -> WorkerError:
    """For whoever waits for a unit, or asks for one, when its source was closed."""
    return WorkerError("it was closed while units were read", "Make a new one to go on.")
