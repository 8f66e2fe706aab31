"""The library alone, without Dagster: seal, point, load.

python examples/without_dagster.py FOLDER
"""

import sys
from pathlib import Path

import pyarrow as pa

from vlm_dagster import (
    FeatureGroup,
    HistoryStore,
    PointerDataset,
    Projection,
    SequenceLoader,
    Trait,
)


def ratings(day: str, first_id: int, rows: list[tuple[int, int, float]]) -> pa.Table:
    """Ratings of one day, a minute apart: (user, item, rating) each."""
    minutes = pa.array([f"{day}T12:{i:02d}:00Z" for i in range(len(rows))])
    users, items, stars = zip(*rows, strict=True)
    return pa.table(
        {
            "user_id": pa.array(users),
            "event_id": pa.array(range(first_id, first_id + len(rows))),
            "event_time": minutes.cast(pa.timestamp("us", "UTC")),
            "item_id": pa.array(items),
            "rating": pa.array(stars, pa.float32()),
        }
    )


def main(folder: Path) -> None:
    group = FeatureGroup(
        "ratings", traits=[Trait("item_id", pa.int64()), Trait("rating", pa.float32())]
    )
    store = HistoryStore.create(folder / "ratings", group, num_buckets=2)
    first = ratings("1997-09-20", 0, [(1, 10, 4.0), (2, 20, 3.0), (1, 11, 5.0)])
    second = ratings("1997-09-21", 3, [(1, 12, 2.0), (2, 21, 5.0)])
    store.seal("1997-09-20", first)
    sealed = store.seal("1997-09-21", second)
    print(f"version {sealed.version}, digest {sealed.digest}")

    snapshot = store.snapshot(version=sealed.version)
    newest = snapshot.read([1, 2], Projection(traits=["item_id"], max_length=2))
    print("newest two of user 1:", newest.of(0)["item_id"].to_pylist())

    pointers = PointerDataset.create(
        folder / "examples", ["ratings"], [Trait("item_id", pa.int64())], num_buckets=2
    )
    requests = second.select(["user_id", "event_id", "item_id"])
    pointers.seal("1997-09-21", requests, {"ratings": snapshot})

    projection = Projection(traits=["item_id", "rating"], max_length=256)
    loader = SequenceLoader(pointers.ref(), {"ratings": projection}, batch_size=2, order="stored")
    for batch in loader:
        sequence = batch.sequences["ratings"]
        for i, target in enumerate(batch.examples["item_id"].tolist()):
            start, end = sequence.offsets[i : i + 2].tolist()
            history = sequence.values["item_id"][start:end].tolist()
            print(f"user {int(batch.examples['user_id'][i])}: {history} -> {target}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
