"""The arms that live in other virtual environments, each in a process that is told what to run.

Their Pythons are named by environment variables; without these, their arms are not run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.history_others import LANCE_PYTHON

__all__ = ["LANCE_PYTHON", "MOSAIC_PYTHON", "Rival", "available"]

MOSAIC_PYTHON = "VLM_BENCH_MOSAIC_PYTHON"

_SCRIPTS = {LANCE_PYTHON: "lance_fat_rows.py", MOSAIC_PYTHON: "mosaic_rows.py"}

# Told to keep its memory, glibc saves Lance a page fault for every 4 KiB of every batch: it is then twice
# as fast. We use memory again, too.
_KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
}


def available(variable: str) -> bool:
    """Whether there is a Python for the arm."""
    return variable in os.environ


class Rival:
    """A script of another environment on the fat rows of a Parquet file.

    Attributes:
        facts: what it says about what it wrote.
    """

    def __init__(self, variable: str, rows: Path, folder: Path, newest: int | None) -> None:
        self._script = _SCRIPTS[variable]
        script = str(Path(__file__).with_name(self._script))
        self._process = subprocess.Popen(
            [os.environ[variable], script, str(rows), str(folder), str(newest or 0)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **_KEEP_MEMORY},
        )
        self.facts: dict[str, Any] = self._answer()

    def examples_per_s(self, arm: str, most: int) -> float:
        """Of one arm, over an epoch or the first so many examples."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps({"arm": arm, "most": most}) + "\n")
        self._process.stdin.flush()
        return float(self._answer()["rate"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                # Its threads are not to be in the way of the other arms.
                self._process.send_signal(signal.SIGSTOP)
                return found
        raise RuntimeError(
            f"{self._script} ended with {self._process.wait()}; what it said is above"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.close()
        self._process.wait()
