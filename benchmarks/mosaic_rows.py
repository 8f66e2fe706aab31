"""Fat rows in MosaicML Streaming's shards, end to end: a script for a Python that has `mosaicml-streaming`
and `torch`; the project does not need them.

    python benchmarks/mosaic_rows.py ROWS.parquet FOLDER NEWEST

NEWEST: 0, or the newest so many events that a model wants of each row. See `rival_server.py` for what it
is told and answers. Shards are not compressed, and lie where they are read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from rival_server import BATCH, TRAITS, collate, serve, source_rows, split_rows
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset

KINDS = dict(zip(TRAITS, ["int64", "int64", "int32", "float32"], strict=True))


def stream(
    folder: str, newest: int | None, shuffle: bool, num_workers: int, most: int
) -> Iterator[int]:
    dataset = StreamingDataset(local=folder, batch_size=BATCH, shuffle=shuffle)
    for batch in StreamingDataLoader(
        dataset,
        batch_size=BATCH,
        num_workers=num_workers,
        collate_fn=partial(collate, newest=newest),
    ):
        yield len(batch[f"{TRAITS[0]}_offsets"]) - 1


def main(rows: str, folder: str, newest: int | None) -> None:
    torch.set_num_threads(2)
    columns = {name: f"ndarray:{kind}" for name, kind in KINDS.items()}
    with MDSWriter(out=folder, columns=columns) as out:
        for batch in source_rows(rows)[1]:
            for row in split_rows(batch):
                out.write(row)
    size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    serve(
        {"bytes": size},
        {
            "stored": partial(stream, folder, newest, False, 0),
            "shuffled": partial(stream, folder, newest, True, 0),
            "two workers": partial(stream, folder, newest, False, 2),
        },
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) or None)
