"""One cell of the benchmark: a table of one shape, all arms on it, in turn."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.fat_rows import LAYOUTS, FatRows, tensors, write
from benchmarks.loader_asof import AsOf
from benchmarks.loader_data import BATCH, TRAITS, Data, Shape
from benchmarks.loader_floor import Floor
from benchmarks.loader_ours import Ours
from benchmarks.loader_rivals import LANCE_PYTHON, MOSAIC_PYTHON, Rival, available
from benchmarks.measure import in_turn

__all__ = ["FAT", "Cell", "run_cell"]

# What may be the opponent. Blobs are not: nobody but the loader that they were written for can read them.
FAT = (
    "by time, snappy",
    "by user, zstd",
    "by user, LZ4",
    "by user, plain",
    "Lance, packed",
    "Lance, uncompressed",
)

Arm = Callable[[], float]


@dataclass(frozen=True)
class Cell:
    """What one cell found.

    Attributes:
        rates: examples a second of each arm.
        sizes: bytes of each layout of fat rows, and of their values as such.
        ways: how each layout was read fastest.
    """

    rates: dict[str, float]
    sizes: dict[str, int]
    ways: dict[str, str]

    @property
    def opponent(self) -> str:
        """The fastest fat rows."""
        return max((arm for arm in FAT if arm in self.rates), key=lambda arm: self.rates[arm])

    def floor(self, form: str) -> float:
        """The faster of one and two threads."""
        return max(rate for arm, rate in self.rates.items() if arm.startswith(f"floor, {form}"))


def run_cell(
    folder: Path,
    shape: Shape,
    *,
    newest: int | None = None,
    rounds: int,
    fat_bytes: int,
    most: int,
    brief: bool = False,
) -> Cell:
    """Build the table and all layouts, and let the arms take turns.

    Args:
        newest: what the model reads, where that is less than what fat rows were written with.
        fat_bytes: the values of so many of the first examples, by user, are written as fat rows: all
            layouts have to fit into the page cache together. Ours and the floor read all examples, as
            they are done with those too soon for a steady state.
        most: examples that arms which take long read.
        brief: only the fat rows, ours and the floor.
    """
    length = newest or shape.length
    data = Data(folder, shape)
    arms: dict[str, Arm] = {}
    examples = data.examples.first(max(fat_bytes // (24 * shape.length), BATCH // 4))
    _check_same(data, length)
    sizes = {"values": 24 * int(examples.lengths.sum())}
    ways: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        fat = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        for name, layout in LAYOUTS.items():
            path = fat / f"{name.replace(', ', '-').replace(' ', '-')}.parquet"
            sizes[name] = write(examples, layout, path)
            read = FatRows(path, newest=newest)
            arms[name] = read.examples_per_s
            ways[name] = read.way
        plain = fat / "by-user-plain.parquet"
        if available(LANCE_PYTHON):
            lance = stack.enter_context(Rival(LANCE_PYTHON, plain, fat / "lance", newest))
            for name in ("packed", "uncompressed"):
                arms[f"Lance, {name}"] = partial(lance.examples_per_s, name, len(examples))
                sizes[f"Lance, {name}"] = lance.facts[f"{name}_bytes"]
                ways[f"Lance, {name}"] = f"format {lance.facts[f'{name}_format']}"
            if not brief:
                for name in ("streaming", "streaming, clumps"):
                    arms[f"LanceDB {name}"] = partial(lance.examples_per_s, name, most)
        if available(MOSAIC_PYTHON) and not brief:
            mosaic = stack.enter_context(Rival(MOSAIC_PYTHON, plain, fat / "mosaic", newest))
            sizes["MosaicML"] = mosaic.facts["bytes"]
            for name in ("stored", "shuffled"):
                arms[f"MosaicML, {name}"] = partial(mosaic.examples_per_s, name, most)
        if not brief:
            arms["join as of, Polars"] = AsOf(data, length, most).examples_per_s
        arms |= _ours(data, length, brief)
        floor = Floor(data, length)
        for threads in (1, 2):
            for form in ("expanded", "views"):
                arms[f"floor, {form}, {threads} threads"] = partial(
                    floor.examples_per_s, threads, copies=form == "expanded"
                )
        # Once unmeasured: files and memory as they are in the middle of a run.
        rates = in_turn(arms, rounds + 1, skip=1)
    return Cell(rates, sizes, ways)


def _check_same(data: Data, length: int) -> None:
    """That ours and the fat rows are the same examples: a benchmark of other data says nothing."""
    batch = Ours(data, length, order="stored").first()
    rows = next(data.examples.first(BATCH).rows())
    assert batch.examples["user_id"].tolist() == rows["user_id"].to_pylist()
    sequence = batch.sequences["events"]
    for name in TRAITS:
        expected = tensors(rows, length)
        assert torch.equal(sequence.values[name], expected[name]), name
        assert sequence.offsets.tolist() == expected[f"{name}_offsets"].tolist()


def _ours(data: Data, length: int, brief: bool) -> dict[str, Arm]:
    arms: dict[str, Arm] = {}
    forms = ("expanded", "views") if brief else ("expanded", "views", "deduplicated")
    for form in forms:
        for verify in ("off", "always"):
            made = Ours(data, length, form=form, verify=verify, mix=0)
            arms[f"ours, {form}, verify {verify}"] = made.examples_per_s
        if not brief and form != "deduplicated":
            arms[f"ours, {form}, as it comes"] = Ours(data, length, form=form).examples_per_s
    return arms
