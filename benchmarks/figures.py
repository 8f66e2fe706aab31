"""What a benchmark found: lines for people as it goes, and one JSON object at the end."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.measure import machine

__all__ = ["Figures"]

_HOLDS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}


@dataclass
class Figures:
    """The figures of a run, in the order in which they were found."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def figure(self, name: str, value: float, unit: str, how: str, limit: float) -> None:
        """One that is to reach a limit: `how` is ">=" or "<="."""
        holds = _HOLDS[how](value, limit)
        reach = f"{how} {limit:g}"
        value = float(f"{value:.4g}")
        self.rows.append(
            {"name": name, "value": value, "unit": unit, "reach": reach, "holds": holds}
        )
        print(
            f"{name:<52}{value:>14,.6g} {unit:<10} {reach:<10} {'holds' if holds else 'MISSES'}",
            flush=True,
        )

    def note(self, name: str, value: float, unit: str, *, keep: bool = False) -> None:
        """One beside; with `keep` it goes into the JSON too."""
        print(f"    {name:<48}{value:>14,.6g} {unit}", flush=True)
        if keep:
            self.rows.append({"name": name, "value": float(f"{value:.4g}"), "unit": unit})

    def end(self, quick: bool) -> None:
        """The last line."""
        print(json.dumps({"machine": machine(), "quick": quick, "figures": self.rows}))
