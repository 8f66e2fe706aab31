"""A loader leaves nothing behind: however its consumer goes, and however long it runs."""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loading import Content, content, contents, loader_of, pointers_in

from vlm_dagster import PointerDataset

THREADED = {"num_workers": 2, "prefetch": 2}
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def pointers(tmp_path_factory: pytest.TempPathFactory) -> PointerDataset:
    return pointers_in(tmp_path_factory.mktemp("tables"))


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


# -- however the consumer goes --------------------------------------------------------------------


def test_two_loaders_in_one_process_do_not_disturb_each_other(pointers: PointerDataset) -> None:
    options: list[dict[str, Any]] = [
        {"seed": 1, **THREADED},
        {"seed": 2, "order": "time", **THREADED},
    ]
    alone = [contents(loader_of(pointers, **chosen)) for chosen in options]
    first, second = (loader_of(pointers, **chosen) for chosen in options)
    together: tuple[list[Content], list[Content]] = ([], [])
    for one, other in itertools.zip_longest(first, second):
        for found, batch in zip(together, (one, other), strict=True):
            if batch is not None:
                found.append(content(batch))
    assert list(together) == alone


class StepError(Exception):
    """As a training step raises it."""


@pytest.mark.parametrize("error", [StepError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("workers", [THREADED, {"num_workers": 2}, {"prefetch": 3}, {}])
def test_after_an_error_in_a_step_it_goes_on_with_the_next_batch(
    pointers: PointerDataset, error: type[BaseException], workers: dict[str, int]
) -> None:
    whole = contents(loader_of(pointers))
    loader = loader_of(pointers, **workers)
    found = []

    def train() -> None:
        for batch in loader:
            found.append(content(batch))
            if len(found) == 3:
                raise error

    with pytest.raises(error):
        train()
    assert found + contents(loader) == whole


def test_after_an_early_break_it_goes_on_with_the_next_batch(pointers: PointerDataset) -> None:
    whole = contents(loader_of(pointers))
    loader = loader_of(pointers, **THREADED)
    found = []
    while len(found) < len(whole):
        for batch in loader:
            found.append(content(batch))
            if len(found) % 4 == 0:
                break
    assert found == whole


def test_a_pass_that_is_dropped_or_never_begun_leaves_nothing(pointers: PointerDataset) -> None:
    loader = loader_of(pointers, **THREADED)
    unused = iter(loader)
    del unused
    begun = iter(loader)
    next(begun)
    assert [t for t in threading.enumerate() if t.name.startswith("vlm-read")]
    del begun  # without close


def test_a_batch_outlives_its_loader(pointers: PointerDataset) -> None:
    loader = loader_of(pointers, **THREADED)
    batches = list(loader)
    before = [content(batch) for batch in batches]
    del loader
    gc.collect()
    again = loader_of(pointers, **THREADED)
    assert contents(again) == before
    assert [content(batch) for batch in batches] == before


# -- Ctrl-C ---------------------------------------------------------------------------------------

INTERRUPTED = """
import json, signal, sys, time
from loading import loader_of
from vlm_dagster import PointerDataset
from vlm_dagster.loaders import sources

folder, options, slow = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] == "slow"
read = sources.DirectSource.read
num_read = 0

def stuck(*args, **kwargs):
    global num_read
    num_read += 1
    if num_read > 4:
        print("ready", flush=True)
        time.sleep(3600)
    return read(*args, **kwargs)

if __name__ == "__main__":  # processes that read import this module
    # Shells start what they run in the background with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if slow:
        sources.DirectSource.read = stuck
    loader = loader_of(PointerDataset.open(folder), **options)
    while True:
        for batch in loader:
            if not slow:
                print("ready", flush=True)
                time.sleep(0.001)
"""


@pytest.mark.parametrize(
    ("options", "storage"),
    [
        (THREADED, "fast"),
        (THREADED, "slow"),
        ({"num_workers": 2}, "slow"),
        ({"prefetch": 2}, "slow"),
        ({**THREADED, "workers": "processes"}, "fast"),
    ],
)
def test_ctrl_c_ends_it_promptly(
    pointers: PointerDataset, tmp_path: Path, options: dict[str, Any], storage: str
) -> None:
    script = tmp_path / "train.py"
    script.write_text(INTERRUPTED)
    process = subprocess.Popen(
        [sys.executable, str(script), pointers.uri, json.dumps(options), storage],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready")
        # To all processes of the group, as a terminal does.
        os.killpg(process.pid, signal.SIGINT)
        # Storage would keep it for an hour.
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "Fatal Python error" not in errors


# -- a long run -----------------------------------------------------------------------------------

LONG = """
import json, sys, threading
from pathlib import Path
from loading import loader_of
from vlm_dagster import PointerDataset

loader = loader_of(
    PointerDataset.open(sys.argv[1]), batch_size=2, lanes=2, form="views", num_workers=2, prefetch=2
)

def in_use():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6, threading.active_count()

num_batches, seen = 0, []
while num_batches < 10_000:
    for batch in loader:
        num_batches += 1
    if num_batches >= 2_500 * (len(seen) + 1):
        seen.append(in_use())
print(json.dumps({"epochs": loader.epoch, "seen": seen}))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_ten_thousand_batches_take_no_more_memory_or_threads_than_a_few(
    pointers: PointerDataset,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LONG, pointers.uri],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
    )
    found = json.loads(done.stdout)
    assert found["epochs"] > 100
    megabytes, num_threads = zip(*found["seen"], strict=True)
    # Those of the epoch that just ended may need a moment.
    assert max(num_threads) <= 1 + 2 + 1
    assert megabytes[-1] - megabytes[0] < 12, megabytes
