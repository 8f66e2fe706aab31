"""`make bench-history`: what the history store promises, measured; a table, then one JSON line.

It measures and does not judge: the exit status is 0 whether or not the figures hold.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import history_files, sealing
from benchmarks.figures import Figures
from benchmarks.history_floor import floor_bits
from benchmarks.history_others import LANCE_PYTHON
from benchmarks.history_read import column_bytes, units
from benchmarks.history_year import DAYS, EARLY, EXTRA, FULL, LATE, QUICK, YEAR
from benchmarks.measure import in_process
from vlm_dagster import HistoryStore


@dataclass
class Bench(Figures):
    """The arms' shared table and what they found."""

    quick: bool = False
    folder: str = ""

    @property
    def shape(self) -> Any:
        return QUICK if self.quick else FULL

    @property
    def uri(self) -> str:
        return str(Path(self.folder, "year"))

    @cached_property
    def year(self) -> dict[str, Any]:
        # Written last, so that a folder kept from an interrupted run is built anew.
        built = Path(self.folder, "year.json")
        if not built.exists():
            shutil.rmtree(self.uri, ignore_errors=True)
            shape = vars(self.shape)
            found = in_process("benchmarks.history", "build_year", uri=self.uri, shape=shape)
            built.write_text(json.dumps(found))
        year: dict[str, Any] = json.loads(built.read_text())
        return year

    def other(self, function: str, folder: str) -> dict[str, Any]:
        """An arm of `history_others.py`."""
        return in_process(
            "benchmarks.history_others",
            function,
            uri=self.uri,
            version=self.year["version"],
            length=self.shape.newest,
            folder=folder,
        )

    def read(self, function: str, **more: Any) -> dict[str, Any]:
        version = self.year["version"]
        return in_process(
            "benchmarks.history_read", function, uri=self.uri, version=version, **more
        )


def build_year(uri: str, shape: dict[str, int]) -> dict[str, Any]:
    from benchmarks import history_year

    return history_year.build(uri, history_year.Shape(**shape))


def seal(bench: Bench) -> None:
    found = sealing.run(8_000_000 if bench.quick else 50_000_000, 1)
    bench.figure("sealing from Parquet", found["events_per_s"], "events/s", ">=", 3e6)
    bench.figure("sealing, peak RSS", found["peak_rss_mb"], "MB", "<=", 2000)
    bench.note("floor: bare DuckDB sort to Parquet", found["floor_events_per_s"], "events/s")


def day400(bench: Bench) -> None:
    seconds = bench.year["seconds"]
    early, late = (statistics.median(seconds[i] for i in days) for days in (EARLY, LATE))
    bench.figure("sealing day 400 against day 10", late / early, "ratio", "<=", 1.2)
    bench.note("days 6-15, median", early * 1e3, "ms")
    bench.note("days 391-400, median", late * 1e3, "ms")


def decode(bench: Bench) -> None:
    found = bench.read("decode", rounds=11)
    bench.figure("full decode, 4 traits", found["events_per_s"], "events/s", ">=", 70e6)
    bench.figure("full decode, of a bare read_row_groups", found["share"], "ratio", ">=", 0.8)
    bench.note("floor: bare read_row_groups", found["bare_events_per_s"], "events/s")
    bench.note("ours, first time", found["cold_events_per_s"], "events/s")
    bench.note("ours, fresh memory for every unit", found["fresh_events_per_s"], "events/s")
    bench.note("ours, two threads", found["two_threads_events_per_s"], "events/s")
    bench.note("memory for a unit, first time", found["peak_mb"], "MB")
    bench.note("of these, the arena", found["arena_mb"], "MB")


def newest(bench: Bench) -> None:
    length = bench.shape.newest
    every = bench.read("newest", length=length, traits=None)
    one = bench.read("newest", length=length, traits=["item_id"])
    rows = every["rows_decoded"] / every["rows_needed"]
    bench.figure(f"newest {length}, rows decoded / needed", rows, "ratio", "<=", 2)
    data = every["data_bytes"] / every["bytes_needed"]
    bench.figure(f"newest {length}, bytes read / needed", data, "ratio", "<=", 2.5)
    share = one["data_bytes"] / every["data_bytes"]
    bench.figure(f"newest {length}, one trait of eight, bytes", share, "ratio", "<=", 0.2)
    both = (every["data_bytes"] + every["footer_bytes"]) / every["bytes_needed"]
    bench.note("bytes read / needed, with footers", both, "ratio")
    bench.note("footers", every["footer_bytes"] / 1e6, "MB")
    bench.note("the eight traits' pages", every["data_bytes"] / 1e6, "MB")
    bench.note("one trait (item_id)", one["data_bytes"] / 1e6, "MB")
    if not bench.quick:
        cheap = bench.read("newest", length=length, traits=["category"])
        bench.note("a smaller one (category)", cheap["data_bytes"] / every["data_bytes"], "ratio")
    bench.note("the eight traits, seconds", every["seconds"], "s")


def compaction(bench: Bench) -> None:
    year = bench.year
    written = (year["sealed"] + year["rewritten"]) / year["sealed"]
    bench.figure(f"write amplification, {DAYS} days", written, "ratio", "<=", 5)
    bench.note("compaction", year["rewritten"] / year["compact_seconds"], "events/s")


def stored(bench: Bench) -> None:
    version = bench.year["version"]
    snapshot = HistoryStore.open(bench.uri).snapshot(version)
    num_events = snapshot.num_events
    found = column_bytes(bench.uri, snapshot)
    lengths = np.concatenate([snapshot.count(part) for part in units(snapshot)])
    floors = floor_bits(lengths.astype(np.float64), YEAR)
    total = sum(size for name, size in found.items() if name not in EXTRA)
    bench.figure("stored, all but the 3 other traits", total / num_events, "B/event", "<=", 16)
    listed = [name for name in floors if name != "event_id"]
    bench.note(
        "of these, the issue's columns", sum(found[n] for n in listed) / num_events, "B/event"
    )
    bench.note("floor of the issue's columns", sum(floors[n] for n in listed) / 8, "B/event")
    bench.note("floor with event_id", sum(floors.values()) / 8, "B/event")
    for name, size in found.items():
        if name not in EXTRA:
            bench.note(name or "footers and page indices", size / num_events, "B/event")
            if name in floors:
                bench.note("  its floor", floors[name] / 8, "B/event")


def files(bench: Bench) -> None:
    uri = str(Path(bench.folder, "files"))
    built = Path(bench.folder, "files.json")
    if not built.exists():
        shutil.rmtree(uri, ignore_errors=True)
        built.write_text(json.dumps(history_files.build(uri, 100_000)))
    users = json.loads(built.read_text())
    rounds = 1 if bench.quick else 3
    seen = [
        in_process("benchmarks.history_files", "resolve", uri=uri, users=users)
        for _ in range(rounds)
    ]
    found = sorted(seen, key=lambda one: float(one["seconds"]))[rounds // 2]
    name = f"opening {found['files']:,} files, resolving a unit"
    bench.figure(name, found["seconds"], "s", "<=", 0.5)
    for part in ("open_s", "segments_s", "read_s"):
        bench.note(part[:-2], found[part], "s")


def plain(bench: Bench) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = bench.other("plain", folder)
    print("sorted plain Parquet, the eight traits (no event_id, no time), and ours")
    for name, value in found.items():
        bench.note(name, value, "")


def lance(bench: Bench) -> None:
    if LANCE_PYTHON not in os.environ:
        print(f"lance: left out; set {LANCE_PYTHON} to a Python that has pylance")
        return
    with tempfile.TemporaryDirectory() as folder:
        found = bench.other("lance", folder)
    print(f"Lance {found.pop('version')}, the eight traits (no event_id, no time)")
    for name, value in found.items():
        bench.note(name, value, "")


ARMS: dict[str, Callable[[Bench], None]] = {
    "seal": seal,
    "day400": day400,
    "decode": decode,
    "newest": newest,
    "compaction": compaction,
    "stored": stored,
    "files": files,
    "plain": plain,
    "lance": lance,
}


def chosen(only: list[str]) -> Iterator[Callable[[Bench], None]]:
    return (arm for name, arm in ARMS.items() if not only or name in only)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the same arms on smaller data")
    parser.add_argument("--only", choices=list(ARMS), nargs="+", default=[], help="these arms")
    parser.add_argument(
        "--keep", metavar="FOLDER", help="build the tables there, or read them if they are there"
    )
    asked = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if asked.keep:
            folder = str(Path(asked.keep, "quick" if asked.quick else "full").absolute())
            Path(folder).mkdir(parents=True, exist_ok=True)
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vlm-bench-"))
        bench = Bench(quick=asked.quick, folder=folder)
        for arm in chosen(asked.only):
            arm(bench)
    bench.end(asked.quick)


if __name__ == "__main__":
    main()
