"""`make bench-loader`: what the loader promises, measured; a table, then one JSON line.

It measures and does not judge: the exit status is 0 whether or not the figures hold.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import loader_memory, loader_shuffle, loader_stored
from benchmarks.figures import Figures
from benchmarks.line_plot import Panel, svg
from benchmarks.loader_cell import FAT, Cell, run_cell
from benchmarks.loader_data import Data, Shape
from benchmarks.loader_floor import Floor
from benchmarks.loader_ours import Ours
from benchmarks.loader_rivals import LANCE_PYTHON, MOSAIC_PYTHON, available
from benchmarks.loader_stall import SLEEPS_MS, starved_share
from benchmarks.measure import in_process, in_turn

MAIN = Shape(8_000, 6_000, 16, 4_096)
OF_K = {
    1: replace(MAIN, per_day=1),
    4: replace(MAIN, num_users=6_000, per_day=4),
    16: MAIN,
    64: replace(MAIN, num_users=4_000, per_day=64),
}
OF_L = {
    256: Shape(60_000, 384, 16, 256),
    1_024: Shape(20_000, 1_536, 16, 1_024),
    16_384: Shape(1_500, 24_000, 16, 16_384),
    65_536: Shape(400, 96_000, 16, 65_536),
}
TENANT = OF_L[16_384]
TENANT_LENGTH = 256
MANY_SHORT = Shape(16_000, 384, 16, 256)

# What a quick run divides the users of every table by.
_QUICK = 20


@dataclass
class Bench(Figures):
    """A run and what it found."""

    quick: bool = False
    folder: Path = Path()
    plot: Path | None = None
    cells: dict[str, Cell] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        return 1 if self.quick else 5

    def shape(self, full: Shape) -> Shape:
        return replace(full, num_users=full.num_users // _QUICK) if self.quick else full

    def cell(self, name: str, shape: Shape, newest: int | None = None, brief: bool = False) -> Cell:
        """Run a cell, unless it was run, and show it."""
        if name not in self.cells:
            found = run_cell(
                self.folder,
                self.shape(shape),
                newest=newest,
                rounds=self.rounds,
                fat_bytes=(1 << 24) if self.quick else 1_600_000_000,
                most=256 if self.quick else 4_096,
                brief=brief,
            )
            self.cells[name] = found
            self._show(name, found)
        return self.cells[name]

    def _show(self, name: str, cell: Cell) -> None:
        expanded, views = cell.floor("expanded"), cell.floor("views")
        print(f"{name}: examples/s, and as a share of the floor's {expanded:,.0f} expanded and ")
        print(f"{views:,.0f} views; stored bytes a byte of values")
        for arm, rate in cell.rates.items():
            floor = views if "views" in arm or "deduplicated" in arm else expanded
            size = f"{cell.sizes[arm] / cell.sizes['values']:7.3f}" if arm in cell.sizes else ""
            mark = "  <- the opponent" if arm == cell.opponent else ""
            print(
                f"    {arm:<40}{rate:>12,.0f}{rate / floor:>8.1%} {size:>8}  {cell.ways.get(arm, '')}{mark}"
            )
            self.rows.append(
                {"name": f"{name}: {arm}", "value": float(f"{rate:.4g}"), "unit": "examples/s"}
            )
        print(flush=True)

    def against(self, name: str, cell: Cell, form: str, reach: float) -> None:
        """Ours, unverified as fat rows are, against the fastest fat rows."""
        rate = cell.rates[f"ours, {form}, verify off"]
        best = cell.rates[cell.opponent]
        self.figure(f"{name}, {form} / best fat rows", rate / best, "ratio", ">=", reach)
        self.note("the floor against them", cell.floor(form) / best, "ratio")
        checked = cell.rates[f"ours, {form}, verify always"]
        self.note("ours with every checksum verified", checked / best, "ratio")
        packed = max(cell.rates[arm] for arm in FAT if arm in cell.rates and "uncomp" not in arm)
        self.note("against the best but uncompressed Lance", rate / packed, "ratio")
        blobs = max(cell.rates[arm] for arm in ("blobs, plain", "blobs, zstd"))
        self.note("against fat rows of opaque blobs", rate / blobs, "ratio")


def main_cell(bench: Bench) -> None:
    cell = bench.cell("K=16, L=4096", MAIN)
    for variable in (LANCE_PYTHON, MOSAIC_PYTHON):
        if not available(variable):
            print(f"    left out: the arms of {variable}, which names no Python")
    bench.against("K=16, L=4096", cell, "expanded", 5)
    bench.against("K=16, L=4096", cell, "views", 10)
    for form in ("expanded", "views"):
        rate = cell.rates[f"ours, {form}, verify off"]
        name = f"K=16, L=4096, {form} / floor"
        bench.figure(name, rate / cell.floor(form), "ratio", ">=", 0.75)


def many(bench: Bench) -> None:
    cell = bench.cell("K=64, L=4096", OF_K[64], brief=True)
    bench.against("K=64, L=4096", cell, "expanded", 8)
    bench.against("K=64, L=4096", cell, "views", 35)


def single(bench: Bench) -> None:
    cell = bench.cell("K=1, L=4096", OF_K[1], brief=True)
    bench.against("K=1, L=4096", cell, "expanded", 1)
    bench.against("K=1, L=4096", cell, "views", 1)


def tenant(bench: Bench) -> None:
    name = f"L={TENANT_LENGTH} of {TENANT.length}"
    cell = bench.cell(f"K=16, {name}", TENANT, TENANT_LENGTH, brief=True)
    bench.against(f"tenant of {name}", cell, "expanded", 20)
    bench.against(f"tenant of {name}", cell, "views", 20)


def cached(bench: Bench) -> None:
    """The second epoch from the folder of decoded units, against the first."""
    data = Data(bench.folder, bench.shape(MAIN))
    first, second = [], []
    for _ in range(min(bench.rounds, 3)):
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            options: dict[str, Any] = {"form": "views", "mix": 0, "verify": "off"}
            ours = Ours(data, MAIN.length, cache=folder, **options)
            first.append(ours.examples_per_s())
            second.append(ours.examples_per_s())
    first.sort()
    second.sort()
    once, again = first[len(first) // 2], second[len(second) // 2]
    bench.figure("second epoch, cached, views / first", again / once, "ratio", ">=", 3)
    bench.note("first epoch, written to the cache", once, "examples/s")
    bench.note("second epoch", again, "examples/s")
    bare = Ours(data, MAIN.length, form="views", mix=0, verify="off")
    plain = in_turn({"plain": bare.examples_per_s}, 3)["plain"]
    bench.note("second epoch against one without a cache", again / plain, "ratio")


def moved(bench: Bench) -> None:
    data = Data(bench.folder, bench.shape(MAIN))
    moved = {
        form: Ours(data, MAIN.length, form=form, verify="off", mix=0).bytes_moved()
        for form in ("views", "deduplicated", "expanded")
    }
    share = moved["views"] / moved["expanded"]
    bench.figure("bytes to the device, views / expanded, K=16", share, "ratio", "<=", 1 / 8)
    bench.note("deduplicated / expanded", moved["deduplicated"] / moved["expanded"], "ratio")
    default = Ours(data, MAIN.length, form="views", verify="off").bytes_moved()
    bench.note("views at the default mix / expanded", default / moved["expanded"], "ratio")


def stored(bench: Bench) -> None:
    users = 5 if bench.quick else 500
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        # As the target's own arithmetic has it: users of 6,000 events, most of them older.
        sizes = loader_stored.stored_bytes(Path(folder), users, 4_200, 60, 4_096, 16)
    usual = sizes["by time, snappy"]
    best = min(size for name, size in sizes.items() if name.startswith("by user"))
    name = "30 days stored, K=16, L=4096"
    bench.figure(f"{name}, ours / best fat", sizes["ours"] / best, "ratio", "<=", 1 / 40)
    bench.figure(f"{name}, ours / usual fat", sizes["ours"] / usual, "ratio", "<=", 1 / 400)
    for part, size in sizes.items():
        bench.note(part, size / 1e6, "MB")


def memory(bench: Bench) -> None:
    few, lots = (1_000_000, 3_000_000) if bench.quick else (10_000_000, 200_000_000)
    peaks: dict[tuple[int, str], float] = {}
    for num_events in (few, lots):
        folder = bench.folder / f"memory-{num_events}"
        done = folder / "built"
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            in_process(
                "benchmarks.loader_memory", "build", folder=str(folder), num_events=num_events
            )
            done.touch()
        for form in ("expanded", "views"):
            call = partial(in_process, "benchmarks.loader_memory", "epoch", folder=str(folder))
            found = call(options={"form": form})
            peaks[num_events, form] = found["peak_mb"]
            bench.note(f"peak RSS, {num_events / 1e6:g} M events, {form}", found["peak_mb"], "MB")
    bench.note("of these, before anything is opened", found["before_mb"], "MB")
    longest = loader_memory.LONGEST
    most = max(peaks.values())
    bench.figure(f"peak RSS, histories up to {longest:,}", most, "MB", "<=", 1_500)
    growth = max(peaks[lots, form] / peaks[few, form] for form in ("expanded", "views"))
    name = f"peak RSS, {lots / 1e6:g} M / {few / 1e6:g} M events"
    bench.figure(name, growth, "ratio", "<=", 1.15)


def start(bench: Bench) -> None:
    folder = str(bench.folder / "start")
    found = in_process("benchmarks.loader_start", "build", folder=folder, quick=bench.quick)
    for resume in (False, True):
        name = "resume" if resume else "start"
        call = partial(in_process, "benchmarks.loader_start", "first_batch", folder=folder)
        runs = [call(pointers=found["pointers"], resume=resume) for _ in range(bench.rounds)]
        middle = sorted(runs, key=lambda run: float(run["seconds"]))[len(runs) // 2]
        label = f"first batch after {name}, {found['files']:,} files"
        bench.figure(label, middle["seconds"], "s", "<=", 1)
        bench.note("of these, opening what is pinned", middle["open_s"], "s")
        bench.note("before, importing torch and the loader", middle["import_s"], "s")


def stall(bench: Bench) -> None:
    data = Data(bench.folder, bench.shape(MAIN))
    floor = Floor(data, MAIN.length)
    for form in ("expanded", "views"):
        ours = Ours(data, MAIN.length, form=form)
        rate = max(floor.examples_per_s(threads, copies=form == "expanded") for threads in (1, 2))
        for sleep_ms in SLEEPS_MS:
            share = starved_share(ours, sleep_ms, 8 if bench.quick else 200)
            name = f"starved, steps of {sleep_ms} ms, {form}"
            bench.figure(name, share, "ratio", "<=", 0.01)
        bench.note("a batch takes the floor", 256e3 / rate, "ms")


def shuffle(bench: Bench) -> None:
    shapes = {"K=16, L=4096": MAIN, "K=16, L=256": MANY_SHORT}
    speed: dict[str, list[float]] = {}
    distinct: dict[str, list[float]] = {}
    apart: dict[str, list[float]] = {}
    for name, shape in shapes.items():
        for form in ("expanded", "views"):
            points = loader_shuffle.curve(
                bench.folder, bench.shape(shape), form, min(bench.rounds, 3)
            )
            speed[f"{name}, {form}"] = [p.examples_per_s / points[0].examples_per_s for p in points]
            for point in points:
                bench.note(
                    f"{name}, {form}, mix={point.mix}",
                    point.examples_per_s,
                    "examples/s",
                    keep=True,
                )
        distinct[name] = [point.distinct for point in points]
        apart[name] = [point.apart for point in points]
        for point in points:
            bench.note(
                f"{name}, mix={point.mix}, distinct users", point.distinct, "ratio", keep=True
            )
            bench.note(
                f"{name}, mix={point.mix}, neighbours apart", point.apart, "ratio", keep=True
            )
    if bench.plot is not None:
        panels = [
            Panel("speed, relative to mix=0", speed),
            Panel("users of a batch, relative to i.i.d.", distinct, top=1),
            Panel("stored neighbours apart, relative to i.i.d.", apart, top=1),
        ]
        bench.plot.write_text(
            svg([str(mix) for mix in loader_shuffle.MIXES], "mix (units)", panels)
        )


def sweep(bench: Bench) -> None:
    if bench.quick:
        return
    for k, shape in OF_K.items():
        bench.cell(f"K={k}, L=4096", shape)
    for length, shape in OF_L.items():
        bench.cell(f"K=16, L={length}", shape)


ARMS: dict[str, Callable[[Bench], None]] = {
    "main": main_cell,
    "many": many,
    "single": single,
    "tenant": tenant,
    "cached": cached,
    "moved": moved,
    "stored": stored,
    "memory": memory,
    "start": start,
    "stall": stall,
    "shuffle": shuffle,
    "sweep": sweep,
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
