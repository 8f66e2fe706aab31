"""The stall report: where the time of an epoch went, and which knob to turn.

Stages add up how long they worked and how long the next one waited for them; the loader adds how long
the trainer waited for each batch. The report puts these in relation, and says in a sentence what holds
the trainer up.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_dagster.cores import num_cores

__all__ = ["Meter", "Setup", "sentence"]

# Waits kept for the percentiles: the latest ones.
_MOST_WAITS = 100_000
# Below this share of its time, waiting is no trainer's problem.
_STARVED = 0.01
_SLOW_START_S = 2.0
# A stage is what holds all else up if its threads work more than this share of the time.
_SATURATED = 0.75


@dataclass(frozen=True)
class Setup:
    """What a loader was told that matters for its speed.

    Attributes:
        workers: "threads" or "processes".
        num_workers: threads or processes that read.
        num_readers: threads that read, or wait for processes that do.
        prefetch: batches ready ahead.
        form: of the batches.
        lanes, world_size: see `SequenceLoader`.
        cached: whether decoded units are kept.
        verify: "always", "sampled" or "off".
    """

    workers: str
    num_workers: int
    num_readers: int
    prefetch: int
    form: str
    lanes: int
    world_size: int
    cached: bool
    verify: str


class Meter:
    """Adds up what stages and consumer report, from any thread, since it was made or reset."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        with self._lock:
            self._busy: dict[str, float] = {}
            self._waited: dict[str, float] = {}
            self._waits: deque[float] = deque(maxlen=_MOST_WAITS)
            self._first: float | None = None
            self._first_seconds = 0.0
            self._wait_seconds = self._step_seconds = self._cpu_seconds = 0.0
            self._num = {"batches": 0, "examples": 0, "events": 0, "values": 0, "bytes": 0}

    @contextmanager
    def busy(self, stage: str) -> Iterator[None]:
        """Counts the time within as work of a stage."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._add(self._busy, stage, time.perf_counter() - begin)

    def waited(self, stage: str, seconds: float) -> None:
        """Counts time that the next stage waited for this one."""
        self._add(self._waited, stage, seconds)

    def _add(self, where: dict[str, float], stage: str, seconds: float) -> None:
        with self._lock:
            where[stage] = where.get(stage, 0.0) + seconds

    def handed_out(
        self, *, waited: float, first: bool, num_examples: int, events: int, values: int, size: int
    ) -> None:
        """Counts a batch.

        Args:
            waited: seconds that the consumer waited for it.
            first: whether it is the first one since the loader was made, for which all was cold; those of
                later epochs are waited for like any other.
            events: that the model sees.
            values: events that are held.
            size: bytes.
        """
        with self._lock:
            if first:
                self._first = waited
                self._first_seconds += waited
            else:
                self._waits.append(waited)
                self._wait_seconds += waited
            for name, number in (
                ("batches", 1),
                ("examples", num_examples),
                ("events", events),
                ("values", values),
                ("bytes", size),
            ):
                self._num[name] += number

    def stepped(self, seconds: float, cpu_seconds: float) -> None:
        """Counts time that the consumer had a batch for, and what of the processor this process used
        since the batch before."""
        with self._lock:
            self._step_seconds += seconds
            self._cpu_seconds += cpu_seconds

    def report(self, setup: Setup) -> dict[str, Any]:
        """All of it, as JSON."""
        with self._lock:
            seconds = self._wait_seconds + self._step_seconds
            waits = np.array(self._waits) * 1e3
            quantiles = np.quantile(waits, [0.5, 0.95, 0.99, 1.0]) if len(waits) else np.zeros(4)
            total = seconds + self._first_seconds
            stages = {
                stage: {
                    "busy_seconds": self._busy.get(stage, 0.0),
                    "busy_share": _share(self._busy.get(stage, 0.0), total * threads),
                    "waited_for_seconds": self._waited.get(stage, 0.0),
                }
                for stage, threads in (("read", max(setup.num_readers, 1)), ("form", 1))
            }
            num = dict(self._num)
            found: dict[str, Any] = {
                "num_batches": num["batches"],
                "num_examples": num["examples"],
                "seconds": total,
                "examples_per_second": num["examples"] / total if total else 0.0,
                "first_batch_seconds": self._first or 0.0,
                "starved_seconds": self._wait_seconds,
                "starved_share": _share(self._wait_seconds, seconds),
                "data_ready_ms": dict(
                    zip(("p50", "p95", "p99", "max"), quantiles.tolist(), strict=True)
                ),
                "stages": stages,
                "worker_waste": 1.0 - stages["read"]["busy_share"],
                "cpu_share": _share(self._cpu_seconds, self._step_seconds * num_cores()),
                "bytes_out": num["bytes"],
                "dedupe_factor": num["events"] / num["values"] if num["values"] else 1.0,
            }
        found["sentence"] = sentence(found, setup)
        return found


def _share(part: float, whole: float) -> float:
    # Stages also work while the trainer's present step is not over and not counted yet.
    return min(part / whole, 1.0) if whole else 0.0


def sentence(report: Mapping[str, Any], setup: Setup) -> str:
    """What holds the trainer up, and which knob to turn."""
    share = float(report["starved_share"])
    if not report["num_batches"]:
        return "Nothing was loaded yet."
    first = float(report["first_batch_seconds"])
    start = ""
    if first > max(_SLOW_START_S, _STARVED * float(report["seconds"])):
        start = f" The first batch came after {first:.1f} s: fewer units a pool (mix) start sooner."
    waited = f"The trainer waited {share:.1%} of the time"
    if share < _STARVED:
        return f"{waited}: loading does not hold it up.{start}"
    waited += f" (p95 of a batch {report['data_ready_ms']['p95']:.1f} ms)"
    return f"{waited}. {_cause(report, setup)}{start}"


def _cause(report: Mapping[str, Any], setup: Setup) -> str:
    read, form = (report["stages"][stage] for stage in ("read", "form"))
    cores = num_cores()
    if not setup.prefetch:
        return "No batch is formed while it computes (prefetch=0): set prefetch=2."
    if setup.lanes % setup.world_size and read["busy_share"] > _SATURATED / 2:
        return (
            f"Reading holds it up: lanes={setup.lanes} is no multiple of world_size="
            f"{setup.world_size}, so that ranks read the same pools: set lanes={setup.world_size} "
            f"or a multiple of it."
        )
    if not setup.num_readers and read["busy_seconds"] >= form["busy_seconds"]:
        return (
            f"Reading holds it up: num_workers=0 reads in the thread that forms batches: "
            f"set num_workers={max(cores - 1, 1)}."
        )
    if form["busy_share"] > _SATURATED and form["busy_share"] >= read["busy_share"]:
        way_out = (
            'use form="views" and expand on the device'
            if setup.form == "expanded"
            else "read fewer traits or a shorter max_length"
        )
        return (
            f"Forming batches holds it up: its thread worked {form['busy_share']:.0%} of the time: "
            f"{way_out}."
        )
    if read["busy_share"] > _SATURATED:
        kind = setup.workers
        own = kind if setup.num_workers > 1 else {"threads": "thread", "processes": "process"}[kind]
        busy = (
            f"Reading holds it up: its {setup.num_workers} {own} worked "
            f"{read['busy_share']:.0%} of the time"
        )
        if setup.num_workers < cores:
            return f"{busy}: raise num_workers to {cores}, the cores that there are."
        ways = []
        if not setup.cached:
            ways.append("keep decoded units for the next epoch (cache=...)")
        if setup.verify == "always":
            ways.append('verify a sample (verify="sampled")')
        if kind == "threads":
            ways.append('read in processes (workers="processes")')
        ways.append("give it more cores")
        return f"{busy} on {cores} cores: {', or '.join(ways)}."
    if report["cpu_share"] > _SATURATED:
        return (
            f"All {cores} cores are busy, and the trainer competes with loading for them: give it "
            f"more cores, or load less a step (fewer traits, shorter max_length)."
        )
    return (
        f"Readers were idle {report['worker_waste']:.0%} of the time, so what is needed comes in "
        f"bursts: raise prefetch (now {setup.prefetch}), or lower events_per_pool."
    )
