"""Collection as a Dagster asset: what holds what in its metadata, the content's digest as data version."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster_project import DAYS, Project
from strategies import files_below

from vlm_dagster import HistoryStore, PointerDataset
from vlm_dagster.assets import gc_asset
from vlm_dagster.errors import SchemaError


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = Project(tmp_path)
    assert project.materialize(DAYS[0], DAYS[-1]).success
    HistoryStore.open(tmp_path / "ratings_history").compact(fanout=2)
    return project


def collect(
    project: Project,
    table: dg.AssetsDefinition,
    config: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[dict[str, Any], str]:
    """The facts that it tells, and the data version."""
    retention = gc_asset(table, keep_hours=0, **options)
    name = retention.key.to_user_string()
    done = dg.materialize(
        [project.history, project.pointers, retention],
        selection=dg.AssetSelection.assets(retention.key),
        instance=project.instance,
        resources=project.resources,
        run_config={"ops": {name: {"config": config or {}}}},
    )
    (event,) = done.asset_materializations_for_node(name)
    facts = {key: value.value for key, value in event.metadata.items()}
    return facts, (event.tags or {})["dagster/data_version"]


def test_it_says_what_would_go_then_lets_it_go(project: Project) -> None:
    store = HistoryStore.open(project.root / "ratings_history")
    digest, before = store.snapshot().digest, files_below(store.uri)
    facts, version = collect(project, project.history)
    assert facts["dry_run"] is True
    assert facts["num_bytes_freed"] == 0  # every window of pointers pins a version
    assert facts["num_versions_kept_by_references"] == len(DAYS)
    assert "pointer dataset" in facts["holds"]
    assert "| the newest |" in facts["holds"]
    assert version == digest
    assert files_below(store.uri) == before
    facts, version = collect(project, project.history, delete=True, move_pins=True)
    assert facts["num_pins_moved"] == len(DAYS)
    assert facts["num_bytes_freed"] > 0
    assert facts["num_files_freed"] == len(before - files_below(store.uri))
    assert version == digest
    again, _ = collect(project, project.history, delete=True, move_pins=True)
    assert again["num_files_freed"] == 0


def test_the_launchpad_chooses_otherwise(project: Project) -> None:
    before = files_below(project.root / "ratings_history")
    wanted = {"delete": False, "move_pins": True}
    facts, _ = collect(project, project.history, wanted, delete=True)
    assert facts["dry_run"] is True
    assert facts["num_bytes_freed"] > 0
    assert files_below(project.root / "ratings_history") == before
    shutil.rmtree(project.root / "next_item_pointers")
    facts, _ = collect(project, project.history, {"delete": True})
    assert (facts["num_referrers_not_found"], facts["num_files_freed"]) == (1, 0)
    assert "**Not found:** pointer dataset" in facts["holds"]
    facts, _ = collect(project, project.history, {"delete": True, "forget": ["*_pointers"]})
    assert facts["num_files_freed"] > 0


def test_sealing_and_training_go_on_after_it(project: Project) -> None:
    """Recomputing a partition pins the version that first covered it, though that was retired."""
    collect(project, project.history, delete=True, move_pins=True)
    before = project.data_version(project.pointers.key, DAYS[1])
    assert project.materialize(DAYS[0], DAYS[-1]).success
    assert project.data_version(project.pointers.key, DAYS[1]) == before
    dataset = PointerDataset.open(project.root / "next_item_pointers")
    pointers = dataset.snapshot().to_table()
    shutil.rmtree(dataset.uri)
    assert project.materialize(DAYS[0], DAYS[-1], only=[project.pointers]).success
    assert PointerDataset.open(dataset.uri).snapshot().to_table() == pointers


def test_pointer_datasets_are_collected_too(project: Project) -> None:
    dataset = PointerDataset.open(project.root / "next_item_pointers")
    facts, version = collect(project, project.pointers, delete=True)
    assert version == dataset.snapshot().digest
    assert (facts["num_files_freed"], facts["dry_run"]) == (0, False)


def test_only_tables_are_collected(project: Project) -> None:
    @dg.asset
    def other() -> None: ...

    with pytest.raises(SchemaError, match="is no table"):
        gc_asset(other)
