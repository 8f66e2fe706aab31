"""How everything here is measured: in a process of its own, in turn, medians and ratios."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def machine() -> str:
    """The machine in words: cores, memory, processor."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores, {gib:.0f} GiB, {model}"


def peak_rss_mb() -> float:
    """The most memory that this process ever held, in MB."""
    status = Path("/proc/self/status")
    if status.exists():
        # What `getrusage` says is at least what the parent held when it started this process.
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1.024e-3
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e3 if sys.platform != "darwin" else peak / 1e6


def in_process(module: str, function: str, **arguments: Any) -> dict[str, Any]:
    """Call a function of a benchmark module in a fresh process; it prints one JSON line."""
    call = (
        f"import json; from {module} import {function}; "
        f"print(json.dumps({function}(**json.loads({json.dumps(json.dumps(arguments))}))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", call], check=True, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def timed(function: Callable[[], Any]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(
    arms: dict[str, Callable[[], float]], rounds: int, *, skip: int = 0
) -> dict[str, float]:
    """The median of each arm's figure over some rounds, the arms taking turns, so that a machine
    that speeds up or slows down does so for all of them.

    Args:
        skip: the first so many rounds do not count: they warm up.
    """
    figures: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for name, arm in arms.items():
            found = arm()
            if number >= skip:
                figures[name].append(found)
    return {name: statistics.median(values) for name, values in figures.items()}
