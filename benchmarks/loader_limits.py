"""The figures of `make bench-loader` that are about bytes, memory, waiting and randomness."""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path

from benchmarks import loader_memory, loader_stored
from benchmarks.line_plot import Line, Panel, svg
from benchmarks.loader_bench import MAIN, OF_L, Bench
from benchmarks.loader_data import Data
from benchmarks.loader_floor import Floor
from benchmarks.loader_ours import Ours
from benchmarks.loader_shuffle import MIXES, curve
from benchmarks.loader_stall import SLEEPS_MS, starved_share
from benchmarks.measure import in_process

__all__ = ["memory", "shuffle", "stall", "start", "stored"]


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
    entropy = sizes["the four traits' entropy"]
    bench.note("floor: entropy / best fat", entropy / best, "ratio")
    bench.note("floor: entropy / usual fat", entropy / usual, "ratio")


def memory(bench: Bench) -> None:
    few, lots = (500_000, 1_500_000) if bench.quick else (10_000_000, 200_000_000)
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
    shapes = {"K=16, L=4096": MAIN, "K=16, L=256": OF_L[256]}
    lines: dict[str, Line] = {}
    speed: dict[str, list[float]] = {}
    distinct: dict[str, list[float]] = {}
    apart: dict[str, list[float]] = {}
    for number, (table, shape) in enumerate(shapes.items()):
        for form in ("expanded", "views"):
            name = f"{table}, {form}"
            points = curve(bench.folder, bench.shape(shape), form, min(bench.rounds, 3))
            lines[name] = Line(number, dashed=form == "views")
            speed[name] = [p.examples_per_s / points[0].examples_per_s for p in points]
            for point in points:
                bench.note(
                    f"{name}, mix={point.mix}", point.examples_per_s, "examples/s", keep=True
                )
        # These depend on the order alone, which is the same for all forms.
        distinct[name] = [point.distinct for point in points]
        apart[name] = [point.apart for point in points]
        for point in points:
            where = f"{table}, mix={point.mix}"
            bench.note(f"{where}, distinct users / i.i.d.", point.distinct, "ratio", keep=True)
            bench.note(f"{where}, neighbours apart / i.i.d.", point.apart, "ratio", keep=True)
    if bench.plot is not None:
        panels = [
            Panel("examples/s, relative to mix=0", speed),
            Panel("users of a batch, relative to i.i.d.", distinct, top=1),
            Panel("stored neighbours apart, relative to i.i.d.", apart, top=1),
        ]
        bench.plot.write_text(svg([str(mix) for mix in MIXES], "mix (units)", lines, panels))
