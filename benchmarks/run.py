"""`make bench`: sealing, and a little of loading, on this machine, as a table, then as one JSON line.

`make bench-history` and `make bench-loader` measure each in full.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import sealing
from benchmarks.loader_cell import run_cell
from benchmarks.loader_data import Shape
from benchmarks.measure import machine

# What `make bench-loader` measures in full.
_SHAPE = Shape(1_000, 6_000, 16, 4_096)


def figures(quick: bool) -> list[dict[str, Any]]:
    rounds = 1 if quick else 3
    seal = sealing.run(1_000_000 if quick else 10_000_000, rounds)
    rows = [
        ("sealing from Parquet", seal["events_per_s"], "events/s"),
        ("sealing, share of a bare DuckDB sort", seal["share_of_floor"], "ratio"),
        ("sealing, bytes stored", seal["bytes_per_event"], "bytes/event"),
        ("sealing, peak memory", seal["peak_rss_mb"], "MB"),
    ]
    shape = replace(_SHAPE, num_users=200) if quick else _SHAPE
    with tempfile.TemporaryDirectory(prefix="vlm-bench-") as folder:
        cell = run_cell(
            Path(folder), shape, rounds=rounds, fat_bytes=100_000_000, most=512, brief=True
        )
    for arm, rate in cell.rates.items():
        if arm == cell.opponent or arm.startswith(("ours", "floor")):
            rows.append((f"loading, K=16, L=4096, {arm}", rate, "examples/s"))
    return [{"name": n, "value": float(f"{value:.4g}"), "unit": unit} for n, value, unit in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller data, one round")
    quick = parser.parse_args().quick
    found = figures(quick)
    width = max(len(row["name"]) for row in found)
    for row in found:
        print(f"{row['name']:<{width}}  {row['value']:>14,.6g} {row['unit']}")
    print(json.dumps({"machine": machine(), "quick": quick, "figures": found}))


if __name__ == "__main__":
    main()
