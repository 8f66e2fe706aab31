"""A process that reads units for another one: started by processes.py, told what to read by messages.

It ends when its parent does: the socket between them closes then, whatever happened to the parent.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection

import pyarrow as pa

from vlm_dagster.errors import VlmError, WorkerError
from vlm_dagster.loaders.materialize import UnitData
from vlm_dagster.loaders.packing import PackedUnit
from vlm_dagster.loaders.plan import Unit
from vlm_dagster.loaders.shared import Block, Lender
from vlm_dagster.loaders.sources import UnitSource

__all__ = ["Answer", "Request", "main"]

# Should a third process hold the parent's end of the socket, a child that it forked say.
_LOOK_FOR_PARENT_S = 1.0


@dataclass(frozen=True)
class Request:
    """Read a unit. `returned` are blocks of units that nobody has any more."""

    number: int
    unit: Unit
    user_ids: pa.Array
    verify: bool
    returned: list[Block]


@dataclass(frozen=True)
class Answer:
    """Where the unit lies, or the pickled error.

    Attributes:
        flaws: what is wrong with the unit, pickled; empty if nothing is.
        bytes_read: as `UnitSource` has it, so far.
    """

    number: int
    block: Block | None = None
    num_bytes: int = 0
    flaws: bytes = b""
    error: bytes = b""
    bytes_read: int | None = 0


def main(connection: Connection) -> None:
    """Read units until the parent closes its end. Further arguments of the program: the descriptor of
    the shared memory, and the parent's process id."""
    memory, parent = (int(argument) for argument in sys.argv[2:4])
    # Ctrl-C is the parent's business: it closes its end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox, parent), daemon=True).start()
    lender = Lender(memory)
    try:
        source: UnitSource = pickle.loads(inbox.get()).open()
    except Exception as error:
        source = _Failed(error)
    while True:
        request: Request = pickle.loads(inbox.get())
        connection.send_bytes(pickle.dumps(_answer(source, lender, request)))


def _listen(connection: Connection, inbox: queue.SimpleQueue[bytes], parent: int) -> None:
    try:
        while True:
            while not connection.poll(_LOOK_FOR_PARENT_S):
                if os.getppid() != parent:
                    os._exit(0)
            inbox.put(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(0)  # at once, whatever is being read


class _Failed:
    """Stands for a source that could not be opened."""

    def __init__(self, error: Exception) -> None:
        self._error = _pickled(error)

    def read(self, unit: Unit, user_ids: pa.Array, *, verify: bool) -> UnitData:
        raise pickle.loads(self._error)  # a new one each time: raising adds to what is raised

    @property
    def bytes_read(self) -> int:
        return 0

    def close(self) -> None: ...


def _answer(source: UnitSource, lender: Lender, request: Request) -> Answer:
    try:
        lender.give_back(request.returned)
        unit = source.read(request.unit, request.user_ids, verify=request.verify)
        packed = PackedUnit(unit)
        block, memory = lender.take(packed.num_bytes)
        try:
            packed.write(memory)
        except BaseException:
            lender.give_back([block])
            raise
        return Answer(
            request.number,
            block,
            packed.num_bytes,
            flaws=b"" if unit.bad is None else pickle.dumps((unit.kept, unit.bad)),
            bytes_read=source.bytes_read,
        )
    except Exception as error:
        return Answer(request.number, error=_pickled(error), bytes_read=source.bytes_read)


def _pickled(error: Exception) -> bytes:
    """An error for another process; what does not survive that is told in words."""
    if not isinstance(error, VlmError) and not hasattr(error, "__notes__"):
        error.add_note(f"In a process that reads units:\n{traceback.format_exc()}")
    try:
        found = pickle.dumps(error)
        if type(pickle.loads(found)) is type(error):
            return found
    except Exception:
        pass
    problem = f"reading a unit failed with {type(error).__name__} ({error})"
    return pickle.dumps(
        WorkerError(problem, "See what it says; workers='threads' shows it in full.")
    )
