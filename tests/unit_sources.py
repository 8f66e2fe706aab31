"""Pointers into two groups, cut into small units: what tests of unit sources read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from strategies import TRAITS, day, events_of_day, history_of, many_events, request_table, seal_days

from vlm_dagster import FeatureGroup, HistoryStore, PointerDataset, Projection, Trait
from vlm_dagster.history import Snapshot
from vlm_dagster.loaders.materialize import UnitData
from vlm_dagster.loaders.plan import Plan, make_plan
from vlm_dagster.loaders.sources import DirectSource, ReadSpec
from vlm_dagster.pointers import PointerSnapshot

COLUMNS = ("user_id", "request_id", "request_time", "label", "note", "clicked")
PROJECTIONS: dict[str, Projection] = {
    "ratings": Projection(["event_id", "item_id", "rating", "title", "liked"], max_length=20),
    "views": Projection(["item_id", "available_at"]),
}


@dataclass(frozen=True)
class World:
    """Tables, opened, and the units of an epoch over them."""

    pointers: PointerSnapshot
    histories: Mapping[str, Snapshot]
    projections: Mapping[str, Projection]
    plan: Plan

    @property
    def spec(self) -> ReadSpec:
        return ReadSpec.of(self.pointers, self.histories, self.projections, COLUMNS)

    def direct(self) -> DirectSource:
        return DirectSource(self.pointers, self.histories, self.projections, COLUMNS)


def world_in(folder: Path, num_events: int = 700, num_users: int = 30) -> World:
    """Make the tables. Some users have examples and no views, a bool and a string stand among the
    examples' columns."""
    events = many_events(4, num_events, num_users)
    history_of(folder / "ratings", events, num_buckets=3)
    seen = [e for e in many_events(5, num_events, num_users) if e["user_id"] % 5]
    views = FeatureGroup("views", TRAITS, availability="recorded")
    seal_days(HistoryStore.create(folder / "views", views, num_buckets=2), seen)
    columns = [
        Trait("label", pa.float64()),
        Trait("note", pa.string()),
        Trait("clicked", pa.bool_()),
    ]
    dataset = PointerDataset.create(
        folder / "pointers", ["ratings", "views"], columns, request="request_time", num_buckets=3
    )
    snapshots = {name: HistoryStore.open(folder / name).snapshot() for name in ("ratings", "views")}
    for number in range(4):
        asked = [
            {
                "user_id": e["user_id"],
                "request_id": e["event_id"],
                "request_time": e["available_at"],
            }
            for e in events_of_day(events, number)
        ]
        names = ["user_id", "request_id", "request_time"]
        table = request_table(asked, pa.int64(), names, pa.int64())
        ids = table["request_id"].to_pylist()
        table = table.append_column("label", pa.array([i / 2 for i in ids], pa.float64()))
        table = table.append_column("note", pa.array(["ü" * (i % 4) for i in ids], pa.string()))
        table = table.append_column("clicked", pa.array([i % 3 == 0 for i in ids], pa.bool_()))
        dataset.seal(day(number), table, snapshots)
    return opened(folder)


def opened(folder: Path, projections: Mapping[str, Projection] = PROJECTIONS) -> World:
    """The tables of a folder, opened anew."""
    pointers = PointerDataset.open(folder / "pointers").snapshot()
    histories = {name: HistoryStore.open(folder / name).snapshot() for name in projections}
    plan = make_plan(
        pointers,
        histories,
        projections,
        examples_per_unit=25,
        events_per_unit=100_000,
        verify=True,
        drop_gone=True,
    )
    return World(pointers, histories, projections, plan)


def assert_same(found: UnitData, wanted: UnitData) -> None:
    """Two units hold the same values of the same types."""
    assert list(found.examples) == list(wanted.examples)
    for name, column in wanted.examples.items():
        assert found.examples[name].type == column.type
        assert found.examples[name].equals(column), name
    assert list(found.arenas) == list(wanted.arenas)
    for group, arena in wanted.arenas.items():
        other = found.arenas[group]
        for values, expected in ((other.starts, arena.starts), (other.lengths, arena.lengths)):
            assert values.dtype == np.int64
            assert values.tolist() == expected.tolist()
        assert list(other.columns) == list(arena.columns)
        for name, column in arena.columns.items():
            assert other.columns[name].type == column.type
            assert other.columns[name].equals(column), (group, name)
