"""The figures of `make bench-loader` that are about speed: against fat rows, and against the floor."""

from __future__ import annotations

import tempfile
from typing import Any

from benchmarks.loader_bench import MAIN, OF_K, OF_L, TENANT, TENANT_LENGTH, Bench
from benchmarks.loader_data import Data
from benchmarks.loader_ours import Ours
from benchmarks.loader_rivals import LANCE_PYTHON, MOSAIC_PYTHON, available
from benchmarks.measure import in_turn

__all__ = ["cached", "main_cell", "many", "moved", "single", "sweep", "tenant"]


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


def sweep(bench: Bench) -> None:
    if bench.quick:
        return
    for k, shape in OF_K.items():
        bench.cell(f"K={k}, L=4096", shape)
    for length, shape in OF_L.items():
        bench.cell(f"K=16, L={length}", shape)
