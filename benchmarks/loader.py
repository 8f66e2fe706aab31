"""`make bench-loader`: what the loader promises, measured; a table, then one JSON line.

It measures and does not judge: the exit status is 0 whether or not the figures hold.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import loader_limits, loader_speed
from benchmarks.loader_bench import Bench

ARMS: dict[str, Callable[[Bench], None]] = {
    "main": loader_speed.main_cell,
    "many": loader_speed.many,
    "single": loader_speed.single,
    "tenant": loader_speed.tenant,
    "cached": loader_speed.cached,
    "moved": loader_speed.moved,
    "stored": loader_limits.stored,
    "memory": loader_limits.memory,
    "start": loader_limits.start,
    "stall": loader_limits.stall,
    "shuffle": loader_limits.shuffle,
    "sweep": loader_speed.sweep,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the same arms on smaller data")
    parser.add_argument("--only", choices=list(ARMS), nargs="+", default=[], help="these arms")
    parser.add_argument(
        "--keep", metavar="FOLDER", help="build the tables there, or read them if they are there"
    )
    parser.add_argument("--plot", metavar="FILE", type=Path, help="the shuffle curve, as SVG")
    asked = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if asked.keep:
            folder = Path(asked.keep, "quick" if asked.quick else "full").absolute()
            folder.mkdir(parents=True, exist_ok=True)
        else:
            made = tempfile.TemporaryDirectory(prefix="vlm-bench-", ignore_cleanup_errors=True)
            folder = Path(stack.enter_context(made))
        bench = Bench(quick=asked.quick, folder=folder, plot=asked.plot)
        for name, arm in ARMS.items():
            if not asked.only or name in asked.only:
                arm(bench)
    bench.end(asked.quick)


if __name__ == "__main__":
    main()
