"""Every batch of the loader equals the fat rows of the reference, to the bit, on whole data sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reference import fat_rows

from vlm_dagster import HistoryStore, PointerDataset, Projection, SequenceLoader, WindowGrid
from vlm_dagster.events import EventSource, GeneratorConfig, Landing, land, open_source
from vlm_dagster.events.generate import generate
from vlm_dagster.windows import Cadence


def sealed(
    source: EventSource, folder: Path, cadence: Cadence, keep: int | None = None
) -> tuple[Landing, PointerDataset, list[dict]]:
    """Histories and pointers of a landed source; the requests: every event, or `keep` a window."""
    landing = land(source, folder / "landing", WindowGrid(cadence))
    group = landing.group
    history = HistoryStore.create(folder / "history", group, num_buckets=3, windows=cadence)
    pointers = PointerDataset.create(
        folder / "pointers",
        [group.name],
        num_buckets=2,
        windows=cadence,
        duplicates=group.duplicates,
    )
    requests: list[dict] = []
    rng = np.random.default_rng(0)
    for window in landing.windows:
        history.seal(window, landing.events(window))
        parts = [pq.read_table(p, columns=["user_id", "event_id"]) for p in landing.events(window)]
        if not parts:
            continue
        asked = pa.concat_tables(parts)
        if keep is not None:
            rows = rng.choice(asked.num_rows, min(keep, asked.num_rows), replace=False)
            asked = asked.take(pa.array(rows))
        pointers.seal(window, asked, {group.name: history.snapshot()})
        requests.extend(asked.to_pylist())
    return landing, pointers, requests


def events_of(landing: Landing, traits: list[str]) -> Iterator[dict]:
    """Plain rows of the landed files, times as integers."""
    clock = "available_at" if landing.group.availability == "recorded" else "event_time"
    for window in landing.windows:
        for path in landing.events(window):
            table = pq.read_table(path, columns=["user_id", "event_id", clock, *traits])
            times = table[clock].cast(pa.int64())
            table = table.drop_columns([clock]).append_column("available_at", times)
            yield from table.to_pylist()


def assert_every_batch_equals_the_reference(
    landing: Landing, pointers: PointerDataset, requests: list[dict], traits: list[str]
) -> int:
    """Returns the longest history met."""
    schema = landing.group.event_schema
    rows = fat_rows(list(events_of(landing, traits)), requests)
    expected = {(row["user_id"], row["event_id"]): row for row in rows}
    assert len(expected) == len(rows)
    seen = set()
    longest = 0
    projection = {landing.group.name: Projection(["event_id", "available_at", *traits])}
    for batch in SequenceLoader(pointers.ref(), projection, batch_size=512, seed=3):
        sequence = batch.sequences[landing.group.name]
        users, ids = batch.examples["user_id"].tolist(), batch.examples["request_id"].tolist()
        wanted = [expected[key] for key in zip(users, ids, strict=True)]
        seen.update(zip(users, ids, strict=True))
        assert batch.examples["request_time"].tolist() == [row["request_time"] for row in wanted]
        lengths = [len(row["sequence"]) for row in wanted]
        longest = max(longest, *lengths)
        assert sequence.offsets.tolist() == np.concatenate([[0], np.cumsum(lengths)]).tolist()
        for name, values in sequence.values.items():
            flat = [event[name] for row in wanted for event in row["sequence"]]
            kind = pa.int64() if name == "available_at" else schema.field(name).type
            expected_bytes = pa.array(flat, kind).to_numpy(zero_copy_only=False).tobytes()
            assert values.numpy().tobytes() == expected_bytes, name
    assert seen == set(expected)
    return longest


@pytest.mark.realdata
def test_movielens_100k_loads_as_its_fat_rows(real_data: Path, tmp_path: Path) -> None:
    source = open_source(real_data / "ml-100k" / "u.data.gz", "movielens")
    landing, pointers, requests = sealed(source, tmp_path, "weekly")
    assert len(requests) == 100_000
    longest = assert_every_batch_equals_the_reference(
        landing, pointers, requests, ["item_id", "rating"]
    )
    assert longest <= 737


def test_histories_of_up_to_20_000_events_load_as_their_fat_rows(tmp_path: Path) -> None:
    config = GeneratorConfig(
        num_users=40, num_days=12, longest_history=20_000, heavy_user_share=0.1, seed=5
    )
    landing, pointers, requests = sealed(generate(config), tmp_path, "daily", keep=60)
    traits = ["item_id", "category", "action", "dwell_seconds"]
    longest = assert_every_batch_equals_the_reference(landing, pointers, requests, traits)
    assert longest > 15_000
