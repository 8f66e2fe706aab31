"""What the arms in other virtual environments share: a script that is told on its standard input which arm
to run, and answers with one JSON line each time, so that its arms take turns with all others. It needs
numpy, pyarrow and torch, and nothing of this project."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

TRAITS = ["item_id", "author_id", "category", "dwell_seconds"]
COLUMNS = ["user_id", *TRAITS]
BATCH = 256


def serve(facts: dict[str, Any], arms: dict[str, Callable[[int], Iterable[int]]]) -> None:
    """Say what was prepared, then answer until the input ends.

    Args:
        facts: of what was written: versions, bytes.
        arms: given the most examples to read, the sizes of the batches read.
    """
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        start = time.perf_counter()
        seen = 0
        for rows in arms[asked["arm"]](asked["most"]):
            seen += rows
            if seen >= asked["most"]:
                break
        print(json.dumps({"rate": seen / (time.perf_counter() - start)}), flush=True)


def source_rows(path: str) -> tuple[pa.Schema, Iterable[pa.RecordBatch]]:
    """The fat rows of a Parquet file, some at a time."""
    file = pq.ParquetFile(path)
    schema = pa.schema([file.schema_arrow.field(name) for name in COLUMNS])
    return schema, file.iter_batches(BATCH, columns=COLUMNS)


def tensors(rows: pa.RecordBatch, newest: int | None) -> dict[str, torch.Tensor]:
    """Values and offsets of each trait, taken over from Arrow without a copy."""
    found = {}
    for name in TRAITS:
        column = rows.column(name)
        values = torch.from_dlpack(column.flatten())
        offsets = column.offsets.to_numpy() - column.offsets[0].as_py()
        if newest is not None:
            lengths = np.minimum(np.diff(offsets), newest)
            ends = np.cumsum(lengths)
            places = np.repeat(offsets[1:] - ends, lengths) + np.arange(int(ends[-1]))
            values = torch.from_numpy(values.numpy()[places])
            offsets = np.append(0, ends)
        found[name] = values
        found[f"{name}_offsets"] = torch.from_numpy(offsets)
    return found


def split_rows(rows: pa.RecordBatch) -> list[dict[str, Any]]:
    """One mapping of numpy arrays a row, which share the batch's memory."""
    columns = {}
    for name in TRAITS:
        column = rows.column(name)
        offsets = column.offsets.to_numpy() - column.offsets[0].as_py()
        columns[name] = np.split(column.flatten().to_numpy(), offsets[1:-1])
    return [{name: columns[name][row] for name in TRAITS} for row in range(rows.num_rows)]


def collate(rows: list[dict[str, Any]], newest: int | None = None) -> dict[str, torch.Tensor]:
    """Rows of numpy arrays as values and offsets of each trait."""
    found = {}
    for name in TRAITS:
        parts = [row[name] if newest is None else row[name][-newest:] for row in rows]
        found[name] = torch.from_numpy(np.concatenate(parts))
        lengths = np.fromiter((len(part) for part in parts), np.int64, len(parts))
        found[f"{name}_offsets"] = torch.from_numpy(np.append(0, np.cumsum(lengths)))
    return found
