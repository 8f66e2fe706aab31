"""The stall report: what holds the trainer up, in numbers that fit and in a sentence that helps."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loading import IDS, loader_of, pointers_in

from vlm_dagster import PointerDataset
from vlm_dagster.loaders import loader as loader_module
from vlm_dagster.loaders import report as report_module
from vlm_dagster.loaders.forming import BatchFormer
from vlm_dagster.loaders.report import Meter, Setup
from vlm_dagster.loaders.sources import DirectSource

SETUP: dict[str, Any] = {
    "workers": "threads", "num_workers": 4, "num_readers": 4, "prefetch": 2, "form": "expanded", "lanes": 8,
    "world_size": 1, "cached": False, "verify": "always",
}  # fmt: skip


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "num_cores", lambda: 4)


# -- sentences ------------------------------------------------------------------------------------


def told(
    *,
    waits: float = 0.5,
    steps: float = 0.5,
    read: float = 0.0,
    form: float = 0.0,
    cpu: float = 0.0,
    first: float = 0.01,
    **changed: Any,
) -> str:
    """The sentence after a hundred batches: seconds waited, computed, of all readers, of forming."""
    setup = Setup(**{**SETUP, **changed})
    meter = Meter()
    for number in range(101):
        waited = first if not number else waits / 100
        meter.handed_out(
            waited=waited, first=not number, num_examples=1, events=1, values=1, size=1
        )
    meter.stepped(steps, cpu)
    for stage, seconds in (("read", read), ("form", form)):
        meter._add(meter._busy, stage, seconds)
    return str(meter.report(setup)["sentence"])


WAITED = r"The trainer waited 50\.0% of the time \(p95 of a batch 5\.0 ms\)\. "


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ({"prefetch": 0}, r"No batch is formed while it computes \(prefetch=0\): set prefetch=2\."),
        (
            {"lanes": 8, "world_size": 3, "read": 3.9},
            r"Reading holds it up: lanes=8 is no multiple of world_size=3, so that ranks read the "
            r"same pools: set lanes=3 or a multiple of it\.",
        ),
        (
            {"num_workers": 0, "num_readers": 0},
            r"Reading holds it up: num_workers=0 reads in the thread that forms batches: set "
            r"num_workers=3\.",
        ),
        (
            {"form": 0.97},
            r'Forming batches holds it up: its thread worked 96% of the time: use form="views" and '
            r"expand on the device\.",
        ),
        (
            {"num_workers": 1, "num_readers": 1, "read": 1.0},
            r"Reading holds it up: its 1 thread worked 99% of the time: raise num_workers to 4, the "
            r"cores that there are\.",
        ),
        (
            {"read": 3.8},
            r"Reading holds it up: its 4 threads worked 94% of the time on 4 cores: keep decoded "
            r"units .*cache.*, or verify a sample .*, or read in processes .*, or give it more cores\.",
        ),
        (
            {"read": 3.8, "cached": True, "verify": "off", "workers": "processes"},
            r"Reading holds it up: its 4 processes worked 94% of the time on 4 cores: give it more "
            r"cores\.",
        ),
        ({"cpu": 3.9}, r"All 4 cores are busy, and the trainer competes with loading for them: .*"),
        (
            {"read": 0.4},
            r"Readers were idle 90% of the time, so what is needed comes in bursts: raise prefetch "
            r"\(now 2\), or lower events_per_pool\.",
        ),
    ],
)
def test_a_bad_set_up_is_told_which_knob_to_turn(case: dict[str, Any], sentence: str) -> None:
    # "form" is a batch form to the set-up, and seconds to the meter.
    assert re.fullmatch(WAITED + sentence, told(**case)), told(**case)


def test_a_form_that_is_views_already_is_told_something_else() -> None:
    meter = Meter()
    for number in range(3):
        meter.handed_out(waited=0.1, first=not number, num_examples=1, events=1, values=1, size=1)
    meter._add(meter._busy, "form", 0.3)
    sentence = meter.report(Setup(**{**SETUP, "form": "views"}))["sentence"]
    assert sentence.endswith("read fewer traits or a shorter max_length.")


def test_where_all_is_fine_it_says_so() -> None:
    assert told(waits=0.001, steps=1.0, read=4.0, prefetch=0) == (
        "The trainer waited 0.1% of the time: loading does not hold it up."
    )
    assert Meter().report(Setup(**SETUP))["sentence"] == "Nothing was loaded yet."


def test_a_slow_start_is_told_beside_it() -> None:
    slow = told(waits=0.001, steps=1.0, first=30.0)
    assert "does not hold it up. The first batch came after 30.0 s" in slow


# -- numbers --------------------------------------------------------------------------------------

seconds = st.floats(0, 1_000)


@given(st.lists(st.tuples(seconds, seconds, st.booleans())), seconds, seconds, seconds)
def test_numbers_fit_whatever_is_counted(
    batches: list[tuple[float, float, bool]], read: float, form: float, cpu: float
) -> None:
    meter = Meter()
    for waited, stepped, first in batches:
        meter.handed_out(waited=waited, first=first, num_examples=3, events=4, values=2, size=9)
        meter.stepped(stepped, cpu)
    meter._add(meter._busy, "read", read)
    meter._add(meter._busy, "form", form)
    found = meter.report(Setup(**SETUP))
    assert json.loads(json.dumps(found)) == found
    assert_fits(found)
    num = len(batches)
    assert (found["num_batches"], found["num_examples"], found["bytes_out"]) == (
        num,
        3 * num,
        9 * num,
    )
    assert found["dedupe_factor"] == (2.0 if batches else 1.0)
    assert found["seconds"] == pytest.approx(sum(a + b for a, b, _ in batches))
    meter.reset()
    assert meter.report(Setup(**SETUP)) == Meter().report(Setup(**SETUP))


def assert_fits(found: dict[str, Any]) -> None:
    stages = found["stages"].values()
    shares = [found[name] for name in ("starved_share", "worker_waste", "cpu_share")]
    assert all(0 <= share <= 1 for share in [*shares, *(stage["busy_share"] for stage in stages)])
    assert all(
        stage[name] >= 0 for stage in stages for name in ("busy_seconds", "waited_for_seconds")
    )
    ready = [found["data_ready_ms"][name] for name in ("p50", "p95", "p99", "max")]
    assert ready == sorted(ready)
    assert 0 <= found["starved_seconds"] <= found["seconds"]
    assert found["first_batch_seconds"] <= found["seconds"]


# -- of a loader ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pointers(tmp_path_factory: pytest.TempPathFactory) -> PointerDataset:
    return pointers_in(tmp_path_factory.mktemp("tables"))


@pytest.mark.parametrize("workers", [{}, {"num_workers": 2, "prefetch": 2}])
def test_a_loader_counts_what_it_hands_out(
    pointers: PointerDataset, workers: dict[str, int]
) -> None:
    loader = loader_of(pointers, uneven="pad", world_size=2, rank=0, form="views", **workers)
    empty = loader.report()
    assert (empty["num_batches"], empty["bytes_read"]) == (0, 0)
    assert empty["sentence"] == "Nothing was loaded yet."
    batches = []
    for _ in range(2):
        for batch in loader:
            batches.append(batch)
            assert_fits(loader.report())  # at any time
    found = loader.report()
    assert found["num_batches"] == len(batches) == 2 * len(loader)
    assert found["num_examples"] == sum(b.batch_size - b.num_padding for b in batches)
    assert found["bytes_out"] == sum(b.num_bytes for b in batches)
    held = sum(b.sequences["ratings"].num_values for b in batches)
    seen = sum(b.sequences["ratings"].num_events for b in batches)
    assert found["dedupe_factor"] == seen / held > 1
    assert found["bytes_read"] > 0
    num_steps = len(loader)
    assert found["uneven"] == {
        "policy": "pad", "num_left_out": 0, "num_extra": 2 * num_steps * 12 - len(IDS),
    }  # fmt: skip
    loader.close()
    assert loader.report()["bytes_read"] == found["bytes_read"]
    loader.reset_report()
    assert loader.report() == {**empty, "uneven": found["uneven"]}


def test_what_was_dropped_is_counted_anew_after_a_reset(tmp_path: Path) -> None:
    pointers = pointers_in(tmp_path)
    lost = next((tmp_path / "history").glob("segment=*/bucket=1/*.parquet"))
    lost.unlink()
    loader = loader_of(pointers, bad="drop")
    for _ in loader:
        pass
    dropped = loader.report()["dropped"]
    loader.reset_report()
    assert loader.report()["dropped"] == {"num_examples": 0, "reasons": []}
    for _ in loader:
        pass
    assert loader.report()["dropped"] == dropped
    assert dropped["num_examples"] > 0


class SlowSource(DirectSource):
    def read(self, *args: Any, **options: Any) -> Any:
        time.sleep(0.1)
        return super().read(*args, **options)


class SlowFormer(BatchFormer):
    def __call__(self, ready: Any) -> Any:
        time.sleep(0.1)
        return super().__call__(ready)


@pytest.mark.parametrize(
    ("slow", "options", "sentence"),
    [
        ("read", {"num_workers": 2}, "set prefetch=2"),
        ("read", {"num_workers": 1, "prefetch": 2}, "raise num_workers to 4"),
        ("form", {"num_workers": 1, "prefetch": 2}, 'use form="views"'),
        (
            "read",
            {"num_workers": 1, "prefetch": 2, "lanes": 3, "rank": 0, "world_size": 2},
            "lanes=3 is no multiple of world_size=2",
        ),
    ],
)
def test_a_loader_that_is_set_up_badly_says_why(
    pointers: PointerDataset,
    monkeypatch: pytest.MonkeyPatch,
    slow: str,
    options: dict[str, Any],
    sentence: str,
) -> None:
    if slow == "read":
        monkeypatch.setattr(loader_module, "DirectSource", SlowSource)
    else:
        monkeypatch.setattr(loader_module, "BatchFormer", SlowFormer)
    loader = loader_of(pointers, **options)
    for _ in loader:
        pass
    assert sentence in loader.report()["sentence"]
