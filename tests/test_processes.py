"""Units read by other processes: the same units, and no way to die that hangs or leaves something."""

from __future__ import annotations

import errno
import gc
import mmap
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from unit_sources import World, assert_same, opened, world_in

from vlm_dagster.errors import (
    ChecksumError,
    CorruptFileError,
    PinError,
    SchemaError,
    StorageError,
    TableError,
    WorkerError,
)
from vlm_dagster.loaders import reader_process, shared, worker
from vlm_dagster.loaders.materialize import UnitData
from vlm_dagster.loaders.plan import Unit
from vlm_dagster.loaders.processes import ProcessSource
from vlm_dagster.loaders.shared import Block, Borrower, Lender, shared_file
from vlm_dagster.loaders.sources import ReadSpec

# Far beyond what anything here takes; a hang fails by it.
PATIENCE_S = 60


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world_in(tmp_path_factory.mktemp("tables"))


@pytest.fixture(scope="module")
def shared_source(world: World) -> Iterator[ProcessSource]:
    source = ProcessSource(world.spec, 2)
    yield source
    source.close()


@pytest.fixture
def hung(world: World, tmp_path: Path) -> World:
    """A world in a folder of its own, on storage that does not answer: opening a file of its history
    waits for ever."""
    shutil.copytree(Path(world.pointers.uri).parent, tmp_path / "hung")
    found = opened(tmp_path / "hung")
    for path in (tmp_path / "hung" / "ratings").glob("segment=*/bucket=*/*.parquet"):
        path.unlink()
        os.mkfifo(path)
    return found


def started(spec: ReadSpec, num_workers: int) -> ProcessSource:
    source = ProcessSource(spec, num_workers)
    source.start()
    return source


def is_running(process_id: int) -> bool:
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(PATIENCE_S * 100):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it does not come to pass")


def read(source: ProcessSource, world: World, unit: Unit, *, verify: bool = True) -> UnitData:
    return source.read(unit, world.plan.users_of(unit), verify=verify)


def children() -> set[int]:
    """Processes whose parent is this one, zombies too."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(stat.rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(folder.name))
    return found


# -- the same units -------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [True, False])
def test_units_are_the_same_as_read_here(
    world: World, shared_source: ProcessSource, verify: bool
) -> None:
    direct = world.direct()
    for unit in world.plan.units:
        users = world.plan.users_of(unit)
        found = shared_source.read(unit, users, verify=verify)
        assert_same(found, direct.read(unit, users, verify=verify))


def test_a_unit_of_nobody_is_empty(world: World, shared_source: ProcessSource) -> None:
    nobody = pa.array([], pa.int64())
    found = shared_source.read(Unit(None, 0, 0, 0, 0, 0), nobody, verify=True)
    assert_same(found, world.direct().read(Unit(None, 0, 0, 0, 0, 0), nobody, verify=True))


def test_threads_share_a_source_and_keep_what_they_got(
    world: World, shared_source: ProcessSource
) -> None:
    units = list(world.plan.units) * 5
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda unit: read(shared_source, world, unit), units))
    direct = world.direct()
    for one, unit in zip(found, units, strict=True):
        assert_same(one, direct.read(unit, world.plan.users_of(unit), verify=True))


def test_workers_start_when_they_are_needed_or_told_to(world: World) -> None:
    source = ProcessSource(world.spec, 2)
    assert source.process_ids == []
    source.start()
    process_ids = source.process_ids
    assert len(process_ids) == 2
    source.start()
    read(source, world, world.plan.units[0])
    assert source.process_ids == process_ids
    source.close()
    with pytest.raises(WorkerError, match="closed"):
        source.start()


def test_two_sources_are_independent(world: World) -> None:
    unit = world.plan.units[0]
    first, second = ProcessSource(world.spec, 1), ProcessSource(world.spec, 1)
    assert_same(read(first, world, unit), read(second, world, unit))
    kept = read(first, world, unit)
    first.close()
    assert_same(read(second, world, unit), kept)
    second.close()


def test_units_stay_whole_after_closing(world: World) -> None:
    source = ProcessSource(world.spec, 1)
    found = [read(source, world, unit) for unit in world.plan.units[:5]]
    source.close()
    del source
    gc.collect()
    direct = world.direct()
    for one, unit in zip(found, world.plan.units, strict=False):
        assert_same(one, direct.read(unit, world.plan.users_of(unit), verify=True))


# -- memory ---------------------------------------------------------------------------------------


def resident_kb(process_id: int) -> int:
    lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def test_blocks_are_used_again_and_memory_stays_flat(world: World) -> None:
    source = started(world.spec, 1)
    places = set()
    (process_id,) = source.process_ids
    resident = 0
    for number in range(300):
        found = read(source, world, world.plan.units[number % len(world.plan.units)])
        places.add(found.arenas["ratings"].columns["item_id"].buffers()[1].address)
        if number == 100:
            resident = resident_kb(process_id)
    assert len(places) <= 3 * len(world.plan.units)  # where it stands in its block differs
    assert len({place >> 16 for place in places}) <= 6
    assert resident_kb(process_id) < resident + 8_000
    source.close()


def test_a_block_comes_back_when_nothing_refers_to_it_and_not_before() -> None:
    descriptor = shared_file()
    lender, borrower = Lender(descriptor), Borrower(descriptor)
    block, memory = lender.take(100_000)
    memory[:] = 7
    values = pa.Array.from_buffers(pa.int64(), 12_500, [None, borrower.borrow(block, 100_000)])
    part = values.slice(10, 5)
    numbers = part.to_numpy()
    del values, part
    assert borrower.take_returned() == []
    other, _ = lender.take(100_000)
    assert other != block
    assert numbers.tolist() == [0x0707070707070707] * 5
    del numbers
    assert borrower.take_returned() == [block]
    lender.give_back([block])
    assert lender.take(90_000)[0] == block
    assert lender.take(90_000)[0] not in (block, other)
    os.close(descriptor)


def test_idle_blocks_beyond_the_limit_lose_their_memory_and_keep_their_place() -> None:
    descriptor = shared_file()
    lender = Lender(descriptor, max_idle_bytes=200_000)
    taken = []
    for _ in range(3):
        block, memory = lender.take(150_000)
        memory[:] = 1
        taken.append(block)
    held = os.fstat(descriptor).st_blocks * 512
    assert held >= 450_000
    lender.give_back(taken)
    assert lender.num_bytes < 200_000
    assert os.fstat(descriptor).st_blocks * 512 <= held - 2 * 150_000
    again = [lender.take(150_000) for _ in range(3)]
    assert {block for block, _ in again} == set(taken)
    os.close(descriptor)


def test_where_memory_cannot_be_released_it_is_used_for_anything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *arguments: int) -> None:
            raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    descriptor = shared_file()
    lender = Lender(descriptor, max_idle_bytes=0)
    for sizes in ([900_000, 500_000], [70_000, 450_000], [10, 10]):
        taken = [lender.take(size)[0] for size in sizes]
        lender.give_back(taken)
        assert lender.num_bytes < 1_500_000
    os.close(descriptor)


def test_a_block_that_cannot_be_mapped_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    descriptor = shared_file()
    lender, borrower = Lender(descriptor), Borrower(descriptor)
    block, _ = lender.take(100)
    monkeypatch.setattr(shared._Extents, "bytes_of", full)
    with pytest.raises(OSError, match="Too many"):
        borrower.borrow(block, 100)
    assert borrower.take_returned() == [block]
    os.close(descriptor)


def test_a_block_larger_than_an_extent_has_one_of_its_own() -> None:
    descriptor = shared_file()
    lender, borrower = Lender(descriptor), Borrower(descriptor)
    small, _ = lender.take(10)
    large, memory = lender.take((1 << 28) + 1)
    assert large.extent == small.extent_size
    memory[-1] = 9
    assert bytes(borrower.borrow(large, len(memory)).slice(len(memory) - 1)) == b"\x09"
    assert os.fstat(descriptor).st_blocks * 512 < 1 << 20
    os.close(descriptor)


@pytest.mark.parametrize("missing", [True, False])
def test_systems_without_files_in_memory_get_one_on_disk_without_a_name(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: bool
) -> None:
    def forbidden(name: str) -> int:
        raise PermissionError(name)

    if missing:
        monkeypatch.delattr(os, "memfd_create")
    else:
        monkeypatch.setattr(os, "memfd_create", forbidden)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = ProcessSource(world.spec, 1)
    unit = world.plan.units[0]
    users = world.plan.users_of(unit)
    assert_same(read(source, world, unit), world.direct().read(unit, users, verify=True))
    assert list(tmp_path.iterdir()) == []
    source.close()


# -- errors ---------------------------------------------------------------------------------------


def test_errors_come_out_with_their_class_and_fields(world: World, tmp_path: Path) -> None:
    shutil.copytree(Path(world.pointers.uri).parent, tmp_path / "lost")
    lost = opened(tmp_path / "lost")
    source = ProcessSource(moved(lost, tmp_path / "lost"), 2)
    unit = max(lost.plan.units, key=lambda one: one.num_events)
    assert read(source, lost, unit).num_examples == unit.num_examples
    source.close()
    paths = sorted((tmp_path / "lost" / "ratings").glob("segment=*/bucket=*/*.parquet"))
    for path in paths:
        path.unlink()
    source = ProcessSource(moved(lost, tmp_path / "lost"), 2)
    for _ in range(2):
        with pytest.raises(CorruptFileError, match="is missing") as raised:
            read(source, lost, unit)
        assert raised.value.path in {
            p.relative_to(tmp_path / "lost" / "ratings").as_posix() for p in paths
        }
    assert len(source.process_ids) == 2
    source.close()


def moved(world: World, folder: Path) -> ReadSpec:
    """The spec of a world that lies in a folder now."""
    spec = world.spec
    pins = {g: replace(pin, uri=str(folder / g)) for g, pin in spec.histories.items()}
    return replace(
        spec, pointers=replace(spec.pointers, uri=str(folder / "pointers")), histories=pins
    )


def test_what_cannot_be_opened_fails_every_read(world: World, tmp_path: Path) -> None:
    nowhere = moved(world, tmp_path / "nowhere")
    source = ProcessSource(nowhere, 1)
    for _ in range(2):
        with pytest.raises(TableError, match="nowhere"):
            read(source, world, world.plan.units[0])
    source.close()
    other = replace(world.spec.histories["views"], digest="0" * 64)
    source = ProcessSource(
        replace(world.spec, histories={**world.spec.histories, "views": other}), 1
    )
    with pytest.raises(PinError):
        read(source, world, world.plan.units[0])
    source.close()


def test_errors_that_do_not_survive_pickling_are_told_in_words() -> None:
    class LocalError(Exception):
        pass

    class ChoosyError(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__("only this")

    for error in (LocalError("odd"), ChoosyError(1, 2)):
        told = pickle.loads(worker._pickled(error))
        assert type(told) is WorkerError
        assert type(error).__name__ in str(told)
        assert str(error) in str(told)
    try:
        raise ValueError("odd")
    except ValueError as error:
        told = pickle.loads(worker._pickled(error))
    assert type(told) is ValueError
    assert "test_processes.py" in told.__notes__[0]
    ours = ChecksumError(group="ratings", user_id=3, end_position=5, num_bad=2)
    assert vars(pickle.loads(worker._pickled(ours))) == vars(ours)


def test_what_is_wrong_with_a_unit_comes_with_it(world: World) -> None:
    class Flawed:
        bytes_read = 12

        def __init__(self) -> None:
            self.source = world.direct()

        def read(self, unit: Unit, user_ids: pa.Array, *, verify: bool) -> UnitData:
            found = self.source.read(unit, user_ids, verify=verify)
            error = ChecksumError(group="ratings", user_id=3, end_position=5, num_bad=1)
            return replace(found, kept=np.arange(found.num_examples) != 1, bad=error)

        def close(self) -> None: ...

    unit = world.plan.units[0]
    request = worker.Request(7, unit, world.plan.users_of(unit), True, [])
    answer = worker._answer(Flawed(), Lender(shared_file()), request)
    assert (answer.number, answer.bytes_read) == (7, 12)
    kept, bad = pickle.loads(answer.flaws)
    assert kept.tolist() == [number != 1 for number in range(unit.num_examples)]
    assert (type(bad), bad.user_id) == (ChecksumError, 3)


def test_bytes_read_are_counted_also_of_workers_that_died(world: World) -> None:
    source = started(world.spec, 1)
    direct = world.direct()
    assert source.bytes_read == 0
    for unit in world.plan.units[:3]:
        read(source, world, unit)
        direct.read(unit, world.plan.users_of(unit), verify=True)
    before = source.bytes_read
    assert before == direct.bytes_read > 0
    os.kill(source.process_ids[0], signal.SIGKILL)
    wait_until(lambda: source.process_ids == [])
    read(source, world, world.plan.units[0])
    assert source.bytes_read > before
    source.close()


def test_a_worker_that_cannot_start_is_an_error_with_its_exit_code(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_process, "_CODE", "raise SystemExit(3)")
    source = ProcessSource(world.spec, 2)
    for _ in range(3):
        with pytest.raises(WorkerError, match="exit code 3") as raised:
            read(source, world, world.plan.units[0])
        assert raised.value.exit_code == 3
    source.close()


@pytest.mark.parametrize("number", [0, -1, True, 1.5])
def test_the_number_of_workers_is_checked(world: World, number: int) -> None:
    with pytest.raises(SchemaError, match="num_workers="):
        ProcessSource(world.spec, number)


# -- dying ----------------------------------------------------------------------------------------


def reading(source: ProcessSource, world: World, unit: Unit) -> tuple[threading.Thread, list]:
    """A thread that reads, and what comes of it."""
    found: list = []

    def run() -> None:
        try:
            found.append(read(source, world, unit))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, found


def test_a_worker_killed_while_it_reads_is_an_error_at_once_and_replaced(
    world: World, hung: World
) -> None:
    source = started(hung.spec, 1)
    unit = hung.plan.units[0]
    thread, found = reading(source, hung, unit)
    time.sleep(1)
    assert thread.is_alive()
    (killed,) = source.process_ids
    os.kill(killed, signal.SIGKILL)
    thread.join(PATIENCE_S)
    (error,) = found
    assert isinstance(error, WorkerError)
    assert error.exit_code == -signal.SIGKILL
    for words in (f"process {killed}", "SIGKILL", f"bucket {unit.bucket}", "events_per_unit"):
        assert words in str(error)
    thread, found = reading(source, hung, unit)
    wait_until(lambda: source.process_ids not in ([], [killed]))
    source.close()
    thread.join(PATIENCE_S)
    assert "closed" in str(found[0])


def test_an_idle_worker_that_was_killed_is_replaced(world: World) -> None:
    source = started(world.spec, 2)
    unit = world.plan.units[0]
    before = source.process_ids
    kept = read(source, world, unit)
    for process_id in before:
        os.kill(process_id, signal.SIGKILL)
    wait_until(lambda: source.process_ids == [])
    assert_same(read(source, world, unit), kept)
    assert not set(source.process_ids) & set(before)
    source.close()


def test_closing_does_not_wait_for_slow_storage(hung: World) -> None:
    source = started(hung.spec, 2)
    threads = [reading(source, hung, unit) for unit in hung.plan.units[:4]]
    time.sleep(1)
    process_ids = source.process_ids
    began = time.monotonic()
    source.close()
    for thread, found in threads:
        thread.join(PATIENCE_S)
        assert isinstance(found[0], WorkerError)
        assert "closed" in str(found[0])
    assert time.monotonic() - began < PATIENCE_S / 4
    assert not any(is_running(process_id) for process_id in process_ids)
    source.close()
    with pytest.raises(WorkerError, match="closed"):
        read(source, hung, hung.plan.units[0])


def test_nothing_is_left_after_closing_or_dropping(world: World) -> None:
    threads, before = set(threading.enumerate()), children()
    descriptors = len(os.listdir("/proc/self/fd"))
    for close in (True, False, True, False):
        source = ProcessSource(world.spec, 2)
        read(source, world, world.plan.units[0])
        if close:
            source.close()
        del source
        gc.collect()
        assert set(threading.enumerate()) == threads
        assert children() == before
    assert len(os.listdir("/proc/self/fd")) == descriptors


# -- as programs run it ---------------------------------------------------------------------------

# Shells start what they run in the background with Ctrl-C ignored.
PREAMBLE = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path[:0] = {path!r}
from pathlib import Path
from unit_sources import opened
from vlm_dagster.loaders.processes import ProcessSource

world = opened(Path({tables!r}))
unit = world.plan.units[0]
users = world.plan.users_of(unit)
"""


def script(folder: Path, code: str) -> str:
    path = [str(Path(__file__).parent), *sys.path]
    return PREAMBLE.format(path=path, tables=str(folder)) + code


def tables_of(world: World) -> Path:
    return Path(world.pointers.uri).parent


def run(code: str, how: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program from a file, from the command line, or from standard input."""
    command = [sys.executable, "-W", "error"]
    given = None
    if how == "file":
        (folder / "program.py").write_text(code)
        command.append(str(folder / "program.py"))
    elif how == "command":
        command += ["-c", code]
    else:
        command.append("-")
        given = code
    return subprocess.run(
        command, input=given, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


@pytest.mark.parametrize("how", ["file", "command", "input"])
def test_a_program_needs_no_guard_and_ends_quietly_without_closing(
    world: World, tmp_path: Path, how: str
) -> None:
    code = "source = ProcessSource(world.spec, 2)\n"
    code += "print(source.read(unit, users, verify=True).num_examples, *source.process_ids)\n"
    result = run(script(tables_of(world), code), how, tmp_path)
    assert result.stderr == ""
    assert result.returncode == 0
    num_examples, *process_ids = map(int, result.stdout.split())
    assert num_examples == world.plan.units[0].num_examples
    assert len(process_ids) == 2
    assert not any(is_running(process_id) for process_id in process_ids)


def test_an_error_that_ends_the_program_ends_the_workers(world: World, tmp_path: Path) -> None:
    code = "source = ProcessSource(world.spec, 2)\nsource.start()\n"
    code += "print(*source.process_ids, flush=True)\nraise KeyError('a step failed')\n"
    result = run(script(tables_of(world), code), "file", tmp_path)
    assert result.stderr.endswith("KeyError: 'a step failed'\n")
    assert not any(is_running(int(process_id)) for process_id in result.stdout.split())


HANGING = """
source = ProcessSource(world.spec, 2)
source.start()
print(*source.process_ids, flush=True)
source.read(unit, users, verify=True)
"""


def start(code: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A program with a process group of its own, and the processes that it says it started."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    assert process.stdout is not None
    return process, [int(number) for number in process.stdout.readline().split()]


@pytest.mark.parametrize("idle", [True, False])
def test_workers_of_a_parent_that_was_killed_end_and_leave_nothing(
    world: World, hung: World, idle: bool
) -> None:
    code = HANGING + "time.sleep(600)\n"
    process, process_ids = start(script(tables_of(world if idle else hung), code))
    time.sleep(1)
    assert len(process_ids) == 2
    assert all(is_running(process_id) for process_id in process_ids)
    process.kill()
    process.communicate()
    wait_until(lambda: not any(is_running(process_id) for process_id in process_ids))
    assert not [name for name in os.listdir("/dev/shm") if "vlm-units" in name]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGRTMIN + 3])
def test_a_worker_killed_by_any_signal_is_told(hung: World, number: int) -> None:
    source = ProcessSource(hung.spec, 1)
    unit = hung.plan.units[0]
    thread, found = reading(source, hung, unit)
    wait_until(lambda: len(source.process_ids) == 1)
    time.sleep(0.5)
    os.kill(source.process_ids[0], number)
    thread.join(20)
    assert len(found) == 1
    assert isinstance(found[0], WorkerError)
    assert "was killed by" in str(found[0])
    source.close()


@pytest.mark.parametrize(
    ("error", "kind"),
    [(OSError(errno.EMFILE, "Too many open files"), StorageError), (MemoryError(), MemoryError)],
)
def test_what_cannot_be_taken_in_is_raised_where_it_is_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]
) -> None:
    def refuse(*given: object) -> None:
        raise error

    monkeypatch.setattr(shared._Extents, "bytes_of", refuse)
    source = ProcessSource(world.spec, 1)
    unit = world.plan.units[0]
    thread, found = reading(source, world, unit)
    thread.join(20)
    assert [type(one) for one in found] == [kind]
    monkeypatch.undo()
    assert read(source, world, unit).num_examples == unit.num_examples
    source.close()


def test_what_goes_wrong_with_a_request_is_its_answer(world: World) -> None:
    unit = world.plan.units[0]
    strange = Block(0, 1 << 28, 0, 1 << 16)
    request = worker.Request(7, unit, world.plan.users_of(unit), True, [strange])
    answer = worker._answer(world.direct(), Lender(shared_file()), request)
    assert answer.block is None
    assert isinstance(pickle.loads(answer.error), KeyError)


def test_each_read_of_what_cannot_be_opened_has_an_error_of_its_own() -> None:
    source = worker._Failed(ValueError("no"))
    found = []
    for _ in range(2):
        with pytest.raises(ValueError, match="no") as raised:
            source.read(Unit(None, 0, 0, 0, 0, 0), pa.array([]), verify=True)
        found.append(raised.value)
    assert found[0] is not found[1]
    assert [len(pickle.loads(worker._pickled(error)).__notes__) for error in found] == [1, 1]


def in_time(work: Callable[[], object]) -> None:
    """Fails if it takes for ever."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()


def test_a_worker_that_does_not_listen_holds_up_nobody_else(world: World) -> None:
    source = started(world.spec, 2)
    unit = world.plan.units[0]
    deaf = source._workers[0]
    wait_until(lambda: deaf._unsent == [])
    os.kill(deaf.process_id, signal.SIGSTOP)
    many = pa.array(range(200_000))  # more than the socket takes
    found: list[BaseException] = []

    def ask() -> None:
        try:
            source.read(Unit(None, 0, 0, 200_000, 0, 0), many, verify=False)
        except BaseException as error:
            found.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    wait_until(lambda: deaf.num_waiting == 1)
    time.sleep(0.2)
    in_time(lambda: read(source, world, unit))
    in_time(lambda: source.bytes_read)
    in_time(source.close)
    in_time(asking.join)
    assert isinstance(found[0], WorkerError)


def test_a_long_spec_waits_for_no_worker_that_is_still_starting(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_process, "_CODE", "import time; time.sleep(600)")
    spec = replace(world.spec, storage_options={"token": "x" * 4_000_000})
    source = ProcessSource(spec, 2)
    in_time(source.start)
    in_time(source.close)


def test_closing_ends_workers_before_it_waits_for_anything(world: World) -> None:
    source = started(world.spec, 1)
    (process_id,) = source.process_ids
    with source._lock:
        closing = threading.Thread(target=source.close, daemon=True)
        closing.start()
        wait_until(lambda: not is_running(process_id))
    closing.join(20)
    assert not closing.is_alive()


@pytest.mark.parametrize("failing", ["shared_file", "Pipe", "_start", "Thread"])
def test_of_a_worker_that_cannot_be_started_nothing_is_left(
    world: World, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def refuse(*given: object, **named: object) -> None:
        raise RuntimeError("too many") if failing == "Thread" else OSError(errno.EMFILE, "too many")

    place = threading if failing == "Thread" else reader_process
    descriptors, before = os.listdir("/proc/self/fd"), children()
    source = ProcessSource(world.spec, 1)
    with monkeypatch.context() as patch:
        patch.setattr(place, failing, refuse)
        with pytest.raises(StorageError, match=r"starting a process.*too many"):
            source.start()
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)
    assert children() == before
    source.start()
    source.close()


def test_a_worker_has_its_parents_flags_and_path_however_long(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, "/nowhere/" + "x" * 300_000])
    monkeypatch.setattr(sys, "warnoptions", ["ignore::ImportWarning"])
    source = started(world.spec, 1)
    command = Path(f"/proc/{source.process_ids[0]}/cmdline").read_bytes().split(b"\0")
    assert b"-Wignore::ImportWarning" in command
    unit = world.plan.units[0]
    assert read(source, world, unit).num_examples == unit.num_examples
    source.close()


def test_workers_import_nothing_from_the_working_directory(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('a stranger ran')")
    monkeypatch.chdir(tmp_path)
    source = ProcessSource(world.spec, 1)
    unit = world.plan.units[0]
    assert source.read(unit, world.plan.users_of(unit), verify=True).num_examples
    source.close()


def test_ctrl_c_ends_all_at_once_with_one_traceback(hung: World) -> None:
    process, process_ids = start(script(tables_of(hung), HANGING))
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert said.count("Traceback") == 1
    assert said.strip().endswith("KeyboardInterrupt")
    assert not any(is_running(process_id) for process_id in process_ids)


def test_it_works_in_a_daemonic_process_as_data_loaders_have(world: World, tmp_path: Path) -> None:
    code = """
import multiprocessing

def work():
    source = ProcessSource(world.spec, 1)
    print(source.read(unit, users, verify=True).num_examples, flush=True)
    source.close()

process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
process.start()
process.join(30)
print(process.exitcode)
"""
    result = run(script(tables_of(world), code), "file", tmp_path)
    assert result.stderr == ""
    assert result.stdout.split() == [str(world.plan.units[0].num_examples), "0"]


def test_a_forked_child_is_told_that_the_source_is_its_parents(
    world: World, tmp_path: Path
) -> None:
    code = """
import multiprocessing
from vlm_dagster.errors import WorkerError
source = ProcessSource(world.spec, 1)

def work():
    try:
        source.read(unit, users, verify=True)
    except WorkerError as error:
        print("forked" in str(error), flush=True)
    source.close()

process = multiprocessing.get_context("fork").Process(target=work)
process.start()
process.join(30)
print(source.read(unit, users, verify=True).num_examples)
"""
    result = run(script(tables_of(world), code), "file", tmp_path)
    assert result.stdout.split() == ["True", str(world.plan.units[0].num_examples)]


def test_it_works_in_a_spawned_process(world: World) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        found = pool.apply(count_in_a_process, (pickle.dumps(world.spec), world.plan.units[0],
                                                world.plan.users_of(world.plan.units[0])))  # fmt: skip
    assert found == world.plan.units[0].num_examples


def count_in_a_process(spec: bytes, unit: Unit, users: pa.Array) -> int:
    source = ProcessSource(pickle.loads(spec), 1)
    try:
        return source.read(unit, users, verify=True).num_examples
    finally:
        source.close()
