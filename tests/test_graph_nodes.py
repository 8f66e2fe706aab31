"""The graph's nodes: one contract of saving and going on that all of them pass; errors, memory, threads."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from graph_nodes import Reader, form, forming, read_ahead, seen, whole_graph
from hypothesis import given
from hypothesis import strategies as st
from strategies import few
from test_schedule import Lanes, by_count, epochs, schedule_of, share_of
from torchdata.nodes import BaseNode, ParallelMapper, Prefetcher

from vlm_dagster import Batch
from vlm_dagster.loaders import graph
from vlm_dagster.loaders.graph import Failure, Ready, Steps, Stop, run
from vlm_dagster.loaders.steps import Share

# -- the nodes ------------------------------------------------------------------------------------


Make = Callable[[Share, Reader], BaseNode[Any]]
NODES: dict[str, Make] = {
    "steps": lambda share, reader: Steps(share),
    "steps from the third on": lambda share, reader: Steps(share, min(2, share.num_steps)),
    "reading in line": lambda share, reader: read_ahead(share, reader, 0),
    "reading in a thread": lambda share, reader: read_ahead(share, reader, 1),
    "reading in three threads": lambda share, reader: read_ahead(share, reader, 3),
    "reading far ahead": lambda share, reader: read_ahead(share, reader, 2, ahead=50),
    "forming in line": lambda share, reader: forming(share, reader, 0),
    "forming in two threads": lambda share, reader: forming(share, reader, 2),
    "prefetching": lambda share, reader: Prefetcher(forming(share, reader, 0), 3),
    "moving to a device": lambda share, reader: ParallelMapper(
        forming(share, reader, 0), graph._Move(torch.device("cpu")), num_workers=0
    ),
    "all of it in line": lambda share, reader: whole_graph(share, reader, 0, 0, 0),
    "all of it": lambda share, reader: whole_graph(share, reader, device=torch.device("cpu")),
    "all of it in many threads": lambda share, reader: whole_graph(share, reader, 3, 2, 4),
}
PHASES: list[Lanes] = [[[(0, 5), (1, 4)], [(2, 7)], [(3, 3)]], [[(4, 4)], [], [(5, 2)]]]


def share_over(phases: list[Lanes], size: int = 3, **options: Any) -> Share:
    chosen = {"uneven": "keep", "begin": 0, "world": 1, "rank": 0, **options}
    return share_of(schedule_of(phases, by_count(size)), size, **chosen)


def rest(node: BaseNode[Any]) -> list[Any]:
    return [seen(item) for item in node]


def assert_goes_on(make: Callable[[], BaseNode[Any]], whole: list[Any], at: int) -> None:
    """Saved after `at` items, a node gives exactly the rest: a fresh one, and the same one again."""
    node = make()
    assert [seen(next(node)) for _ in range(at)] == whole[:at]
    state = json.loads(json.dumps(node.state_dict()))
    fresh = make()
    fresh.reset(state)
    # A state is that of the place it was taken at, however often it is taken.
    assert fresh.state_dict() == fresh.state_dict()
    between = json.loads(json.dumps(fresh.state_dict()))
    assert rest(fresh) == whole[at:]
    node.reset(between)
    assert rest(node) == whole[at:]
    for _ in range(2):  # after the end there is nothing, over and over
        with pytest.raises(StopIteration):
            next(node)


@pytest.mark.parametrize("name", NODES)
def test_every_node_goes_on_from_any_item(name: str) -> None:
    share = share_over(PHASES)

    def make() -> BaseNode[Any]:
        return NODES[name](share, Reader())

    node = make()
    whole = rest(node)
    assert len(whole) == share.num_steps - (2 if "third" in name else 0)
    # A node that was gone over begins anew when it is reset, and not before.
    ended = json.loads(json.dumps(node.state_dict()))
    node.reset()
    assert rest(node) == whole
    node.reset(ended)
    assert rest(node) == []
    for at in range(len(whole) + 1):
        assert_goes_on(make, whole, at)


@pytest.mark.parametrize("name", NODES)
@few(4)
@given(phases=epochs(2), size=st.integers(1, 6), data=st.data())
def test_every_node_goes_on_in_epochs_of_any_size(
    name: str, phases: list[Lanes], size: int, data: st.DataObject
) -> None:
    world = data.draw(st.integers(1, 3))
    uneven = data.draw(st.sampled_from(["keep", "drop", "repeat", "pad"]))
    share = share_over(phases, size, world=world, uneven=uneven)

    def make() -> BaseNode[Any]:
        return NODES[name](share, Reader())

    whole = rest(make())
    assert_goes_on(make, whole, data.draw(st.integers(0, len(whole))))


# -- errors ---------------------------------------------------------------------------------------


def collect(found: list[Any], batches: Iterator[Batch]) -> None:
    for batch in batches:
        found.append(seen(batch))  # noqa: PERF401 - what came before an error counts


class Panic(BaseException):
    """As native code raises it: no Exception, yet it must not leave anybody waiting."""


@pytest.mark.parametrize("error", [OSError("disk"), KeyError("x"), MemoryError(), Panic("native")])
@pytest.mark.parametrize("readers", [0, 1, 3])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_of_reading_comes_at_its_place_as_it_was_raised(
    error: BaseException, readers: int, prefetch: int
) -> None:
    share = share_over(PHASES)
    bad = 1

    def before(unit: int) -> None:
        if unit == 2 * bad + 1:
            raise error

    first = next(n for n in range(share.num_steps) if bad in share.step(n).pieces.pool)
    assert first > 1
    whole = rest(whole_graph(share, Reader()))
    stop = Stop()
    found: list[Any] = []
    with pytest.raises(type(error)) as raised:
        collect(found, run(whole_graph(share, Reader(before), readers, 0, prefetch, stop), stop))
    assert raised.value is error
    assert found == whole[:first]


@pytest.mark.parametrize("formers", [0, 2])
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("error", [ValueError("odd"), Panic("native")])
def test_an_error_of_forming_comes_at_its_place_as_it_was_raised(
    error: BaseException, formers: int, prefetch: int
) -> None:
    def failing(ready: Ready) -> Batch:
        if ready.step.number == 4:
            raise error
        return form(ready)

    share = share_over(PHASES)
    stop = Stop()
    found: list[Any] = []
    with pytest.raises(type(error)) as raised:
        collect(found, run(whole_graph(share, Reader(), 2, formers, prefetch, stop, failing), stop))
    assert raised.value is error
    assert len(found) == 4


def test_after_an_error_the_state_is_that_before_it() -> None:
    share = share_over(PHASES)
    broken = {"unit": 3}

    def before(unit: int) -> None:
        if unit == broken["unit"]:
            raise OSError("the cable is out")

    whole = rest(read_ahead(share, Reader(), 1))
    node = read_ahead(share, Reader(before), 1)
    found = []
    while not isinstance(item := next(node), Failure):
        found.append(seen(item))
    state = node.state_dict()
    broken["unit"] = -1
    node.reset(state)
    assert found + rest(node) == whole


# -- memory ---------------------------------------------------------------------------------------


def eventually(holds: Callable[[], bool]) -> bool:
    """Threads need a moment to let go of what they had."""
    deadline = time.monotonic() + 10
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.005)
    return holds()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_pools_are_let_go_after_their_last_use(workers: int) -> None:
    share = share_over(PHASES)
    reader = Reader()
    node = read_ahead(share, reader, workers)
    later: list[set[int]] = [
        set(share.step(n).pieces.pool.tolist()) for n in range(share.num_steps)
    ]
    for number in range(share.num_steps):
        ready = next(node)
        assert isinstance(ready, Ready)
        del ready
        used = set().union(*later[: number + 1])
        needed = used.intersection(set().union(*later[number + 1 :]))
        assert eventually(lambda: reader.in_memory() == needed)  # noqa: B023
    # Nor is any part of one left with a thread that read it.
    assert eventually(lambda: not reader.parts)
    # Each was read once.
    assert sorted(reader.read_units) == list(range(12))


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_no_more_pools_are_read_ahead_than_allowed(ahead: int) -> None:
    phases: list[Lanes] = [[[(n, 4) for n in range(20)]]]
    share = share_over(phases, 4)  # a pool a step
    begun: set[int] = set()
    reader = Reader(lambda unit: begun.add(unit // 2))
    node = read_ahead(share, reader, 2, ahead=ahead)
    for number in range(share.num_steps):
        ready = next(node)
        del ready
        # One is the step's, and the others are ahead of it.
        assert eventually(lambda: len(begun) == min(number + 1 + ahead, 20))  # noqa: B023
        assert len(begun) <= number + 1 + ahead


# -- threads --------------------------------------------------------------------------------------


def threads() -> set[threading.Thread]:
    return set(threading.enumerate())


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threads()
    yield
    if threads() - before:
        gc.collect()  # what a test's own error still refers to
    assert eventually(lambda: not threads() - before), threads() - before


def ends(function: Callable[[], object]) -> bool:
    """Whether it ends at all, without waiting for the test's own gate."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(timeout=20)
    return not thread.is_alive()


# Without either of them the consumer's own thread reads.
@pytest.mark.parametrize(("readers", "prefetch"), [(0, 2), (1, 0), (1, 2), (3, 0), (3, 2)])
def test_closing_does_not_wait_for_slow_storage(readers: int, prefetch: int) -> None:
    gate = threading.Event()
    share = share_over([[[(n, 3) for n in range(9)]]])

    def before(unit: int) -> None:
        if unit >= 2:
            gate.wait()

    stop = Stop()
    batches = run(whole_graph(share, Reader(before), readers, 0, prefetch, stop), stop)
    assert seen(next(batches)) == [0, 1, 2]
    try:
        assert ends(batches.close)  # type: ignore[attr-defined]
    finally:
        gate.set()


def test_stopping_ends_one_who_waits_for_a_batch() -> None:
    gate = threading.Event()
    reached = threading.Event()

    def before(unit: int) -> None:
        reached.set()
        gate.wait()

    stop = Stop()
    found: list[Batch] = []
    batches = run(whole_graph(share_over(PHASES), Reader(before), 2, 0, 0, stop), stop)
    waiting = threading.Thread(target=lambda: found.extend(batches), daemon=True)
    waiting.start()
    try:
        assert reached.wait(20)
        stop.set()
        waiting.join(timeout=20)
        assert not waiting.is_alive()
        assert found == []
    finally:
        gate.set()


def test_a_graph_that_is_dropped_half_way_or_before_its_start_leaves_nothing() -> None:
    reader = Reader()
    stop = Stop()
    unused = run(whole_graph(share_over(PHASES), reader, stop=stop), stop)
    del unused
    assert reader.read_units == []
    batches = run(whole_graph(share_over(PHASES), reader, stop=stop), stop)
    next(batches)
    del batches
    assert eventually(lambda: not reader.in_memory())
