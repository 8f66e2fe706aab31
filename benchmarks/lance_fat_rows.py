"""Fat rows in Lance, and LanceDB's StreamingDataset over them: a script for a Python that has `pylance`,
`lancedb` and `torch`; the project does not need them.

    python benchmarks/lance_fat_rows.py ROWS.parquet FOLDER NEWEST

NEWEST: 0, or the newest so many events that a model wants of each row. See `rival_server.py` for what it
is told and answers. The tables are written in the format of today, which packs bits, and in the older
one that does not compress.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import lance
import lancedb
import torch
from lancedb.streaming import StreamingDataLoader, StreamingDataset
from rival_server import BATCH, COLUMNS, collate, serve, source_rows, split_rows, tensors

FORMATS = {"packed": None, "uncompressed": "2.0"}


def scan(path: Path, newest: int | None, most: int) -> Iterator[int]:
    dataset = lance.dataset(path)
    for rows in dataset.scanner(columns=COLUMNS, batch_size=BATCH, batch_readahead=2).to_reader():
        tensors(rows, newest)
        yield rows.num_rows


def stream(folder: Path, newest: int | None, clump: int | None, most: int) -> Iterator[int]:
    dataset = StreamingDataset(
        lancedb.connect(folder).open_table("packed"),
        columns=COLUMNS[1:],
        read_batch_size=BATCH,
        shuffle_clump_size=clump,
        transform=split_rows,
    )
    for batch in StreamingDataLoader(
        dataset, batch_size=BATCH, collate_fn=partial(collate, newest=newest)
    ):
        yield len(batch[f"{COLUMNS[1]}_offsets"]) - 1


def main(rows: str, folder: str, newest: int | None) -> None:
    torch.set_num_threads(2)
    paths = {name: Path(folder, f"{name}.lance") for name in FORMATS}
    facts = {"version": lance.__version__, "lancedb": lancedb.__version__}
    for name, version in FORMATS.items():
        schema, batches = source_rows(rows)
        written = lance.write_dataset(
            batches, paths[name], schema, data_storage_version=version or "stable"
        )
        files = paths[name].rglob("*")
        facts[f"{name}_bytes"] = sum(path.stat().st_size for path in files if path.is_file())
        facts[f"{name}_format"] = written.data_storage_version
    serve(
        facts,
        {
            **{name: partial(scan, path, newest) for name, path in paths.items()},
            "streaming": partial(stream, Path(folder), newest, None),
            "streaming, clumps": partial(stream, Path(folder), newest, BATCH),
        },
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) or None)
