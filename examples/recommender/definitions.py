"""A complete project of your own: events in a lake, to a trained model, from Dagster.

    vlm-dagster generate lake --days 14 --users 500          # or put your own files there
    LAKE=lake dagster dev -f examples/recommender/definitions.py

The lake has one Parquet file a day: `lake/events-2025-01-01.parquet`.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlm_dagster import FeatureGroup, PointerSpec, Trait, Window
from vlm_dagster.assets import (
    automation_sensor,
    evaluation_asset,
    history_asset,
    history_checks,
    on_new_checkpoint,
    on_new_pointers,
    pointer_asset,
    pointer_checks,
    sealing_schedule,
    training_asset,
)
from vlm_dagster.io_managers import (
    VlmCheckpointIOManager,
    VlmHistoryIOManager,
    VlmPointerIOManager,
)

LAKE = Path(os.environ.get("LAKE", "lake"))
DAILY = dg.DailyPartitionsDefinition("2025-01-01")

# What an event is: beside user, id and times, these traits.
VIEWS = FeatureGroup(
    "interactions",
    [
        Trait("item_id", pa.int64()),
        Trait("author_id", pa.int64()),
        Trait("category", pa.int16()),
        Trait("action", pa.int8()),
        Trait("dwell_seconds", pa.float32()),
    ],
    availability="recorded",
)

# What an example is: predict this event; was it more than a view?
EXAMPLES = PointerSpec(
    "next_item",
    ["interactions"],
    [Trait("item_id", pa.int64()), Trait("label", pa.int8())],
    max_length=1024,
)


def events(window: Window) -> list[str]:
    """The events of one day, as Parquet paths; a day without a file is sealed as empty."""
    path = LAKE / f"events-{window}.parquet"
    return [str(path)] if path.exists() else []


def requests(window: Window) -> Iterator[pa.Table]:
    """One example an event, with its label."""
    for path in events(window):
        table = pq.read_table(path, columns=["user_id", "event_id", "item_id", "action"])
        label = pc.greater(table["action"], 0).cast(pa.int8())
        yield table.drop_columns(["action"]).append_column("label", label)


history = history_asset(VIEWS, events=events, partitions_def=DAILY, num_buckets=4)
pointers = pointer_asset(
    EXAMPLES, requests=requests, histories=[history], partitions_def=DAILY, num_buckets=4
)
ranker = training_asset(
    pointers=pointers,
    options={"group": "interactions", "label_column": "label", "max_seconds": 60},
    automation_condition=on_new_pointers(),
)
evaluation = evaluation_asset(
    checkpoint=ranker, pointers=pointers, automation_condition=on_new_checkpoint(ranker.key)
)

defs = dg.Definitions(
    assets=[history, pointers, ranker, evaluation],
    asset_checks=[*history_checks(history), *pointer_checks(pointers)],
    schedules=[sealing_schedule([history, pointers])],
    sensors=[automation_sensor([ranker, evaluation])],
    resources={
        "history_io_manager": VlmHistoryIOManager(root=str(LAKE / "tables")),
        "pointer_io_manager": VlmPointerIOManager(root=str(LAKE / "tables")),
        "checkpoint_io_manager": VlmCheckpointIOManager(root=str(LAKE / "checkpoints")),
    },
)
