"""A run of the loader's benchmark: its tables, the cells that were run, and how they are shown."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.figures import Figures
from benchmarks.loader_cell import FAT, Cell, run_cell
from benchmarks.loader_data import Shape

__all__ = ["MAIN", "OF_K", "OF_L", "TENANT", "TENANT_LENGTH", "Bench"]

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

# What a quick run divides the users of every table by.
_QUICK = 40


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
                fat_bytes=(1 << 24) if self.quick else 800_000_000,
                most=256 if self.quick else 2_048,
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
