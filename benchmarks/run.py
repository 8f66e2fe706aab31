"""`make bench`: sealing and loading on this machine, as a table, then as one JSON line."""

from __future__ import annotations

import argparse
import json
from typing import Any

from benchmarks import loading, sealing
from benchmarks.measure import machine


def figures(quick: bool) -> list[dict[str, Any]]:
    rounds = 1 if quick else 3
    seal = sealing.run(1_000_000 if quick else 10_000_000, rounds)
    rows = [
        ("sealing from Parquet", seal["events_per_s"], "events/s"),
        ("sealing, share of a bare DuckDB sort", seal["share_of_floor"], "ratio"),
        ("sealing, bytes stored", seal["bytes_per_event"], "bytes/event"),
        ("sealing, peak memory", seal["peak_rss_mb"], "MB"),
    ]
    users = 100 if quick else 400
    for length in (200, 4096):
        load = loading.run(users, 5000, length, 16, rounds)
        name = f"loading, L={length}, 16 examples a user"
        rows += [
            (name, load["ours_examples_per_s"], "examples/s"),
            (name, load["ours_events_per_s"], "events/s"),
            (f"{name}, unverified", load["ours_unverified_examples_per_s"], "examples/s"),
            (f"{name}, fat rows by time", load["fat_time_examples_per_s"], "examples/s"),
            (f"{name}, fat rows by user", load["fat_user_examples_per_s"], "examples/s"),
            (f"{name}, floor", load["floor_examples_per_s"], "examples/s"),
            (f"{name}, against the best fat rows", load["against_best_fat"], "ratio"),
            (f"{name}, share of the floor", load["share_of_floor"], "ratio"),
            (f"{name}, fat rows by time, stored", load["fat_time_bytes"] / 1e6, "MB"),
            (f"{name}, fat rows by user, stored", load["fat_user_bytes"] / 1e6, "MB"),
            (f"{name}, history and pointers, stored", load["stored_bytes"] / 1e6, "MB"),
        ]
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
