"""The LanceDB side of `make bench-history`'s arm `lance`: a script of its own, for a Python that has
`pylance` (the package of the Lance format that LanceDB stores tables in); the project does not need it.

    python benchmarks/lance_rows.py ROWS.arrow FOLDER LENGTH TRAIT...

ROWS.arrow has `user_id` and the traits, sorted by user and time. Prints one JSON line. Where each user's
rows begin is given to it for free, as our footers give it to us.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

# One thread, as all other arms; set before Lance is imported.
os.environ.setdefault("LANCE_CPU_THREADS", "1")
os.environ.setdefault("LANCE_IO_THREADS", "1")
os.environ.setdefault("TOKIO_WORKER_THREADS", "1")

import lance
import numpy as np
import pyarrow as pa


def median_of(function: Callable[[], object], rounds: int = 5) -> float:
    function()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main(rows: str, folder: str, length: int, traits: list[str]) -> dict[str, float | str]:
    table = pa.ipc.open_file(pa.memory_map(rows)).read_all()
    ids = table["user_id"].to_numpy()
    ends = np.append(np.flatnonzero(np.diff(ids)) + 1, len(ids))
    begins = np.maximum(ends - length, np.append(0, ends[:-1]))

    def places(users: slice) -> np.ndarray:
        lengths = (ends - begins)[users]
        base = np.repeat(begins[users] - np.cumsum(lengths) + lengths, lengths)
        return base + np.arange(len(base))

    lance.write_dataset(table, folder)
    size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    every, ten = places(slice(None)), places(slice(0, None, max(len(ends) // 10, 1)))

    def scan() -> object:
        return lance.dataset(folder).to_table(columns=traits)

    def take(which: np.ndarray) -> object:
        return lance.dataset(folder).take(which, columns=traits)

    return {
        "version": lance.__version__,
        "bytes": size / table.num_rows,
        "scan_events_per_s": table.num_rows / median_of(scan),
        "newest_s": median_of(lambda: take(every)),
        "ten_users_s": median_of(lambda: take(ten)),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:])))
