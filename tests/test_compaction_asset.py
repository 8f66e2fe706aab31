"""Compaction as a Dagster asset: figures in its metadata, the content's digest as data version."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest
from dagster_project import DAYS, HISTORY, Project

from vlm_dagster import HistoryStore
from vlm_dagster.assets import compaction_asset
from vlm_dagster.errors import SchemaError


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def compact(project: Project) -> dg.AssetMaterialization:
    layout = compaction_asset(project.history, fanout=2)
    done = dg.materialize(
        [project.history, layout],
        selection=dg.AssetSelection.assets(layout.key),
        instance=project.instance,
        resources=project.resources,
    )
    (event,) = done.asset_materializations_for_node("ratings_history_layout")
    return event


def test_it_merges_and_says_what_it_did(project: Project) -> None:
    assert project.materialize(DAYS[0], DAYS[-1]).success
    store = HistoryStore.open(str(project.root / "ratings_history"))
    digest = store.snapshot().digest
    first = compact(project)
    facts = {name: value.value for name, value in first.metadata.items()}
    assert (facts["segments_before"], facts["segments_after"]) == (5, 2)
    assert facts["num_events_rewritten"] == 12
    assert facts["version"] == store.snapshot().version
    assert store.snapshot().digest == digest == (first.tags or {})["dagster/data_version"]
    again = compact(project)
    assert again.metadata["num_merges"].value == 0
    assert (again.tags or {})["dagster/data_version"] == digest


def test_checks_and_sealing_go_on_over_compacted_segments(project: Project) -> None:
    assert project.materialize(DAYS[0], DAYS[3]).success
    compact(project)
    # The same again: reused, and the checks look into the merged segment.
    assert project.materialize(DAYS[0], DAYS[3]).success
    before = project.data_version(HISTORY, DAYS[1])
    assert project.materialize(DAYS[4]).success
    assert project.data_version(HISTORY, DAYS[1]) == before


def test_only_a_history_is_compacted(project: Project) -> None:
    with pytest.raises(SchemaError, match="is no history"):
        compaction_asset(project.pointers)
