"""The demonstration's code location loads, lightly, with and without a demo's settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest

from vlm_dagster.definitions import demo_definitions
from vlm_dagster.demo.settings import DemoSettings, default_settings
from vlm_dagster.errors import SchemaError
from vlm_dagster.events import GeneratorConfig

ROOT = Path(__file__).resolve().parent.parent


def run_python(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "VLM_HOME": str(home), "DAGSTER_HOME": str(home)}
    home.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_dagster_validates_the_workspace(tmp_path: Path) -> None:
    done = run_python(
        "-m", "dagster", "definitions", "validate", "-w", "workspace.yaml", home=tmp_path / "home"
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", ["torch", "torchdata", "duckdb", "polars", "pandas"])
def test_loading_the_code_location_does_not_import(module: str, tmp_path: Path) -> None:
    program = (
        "import sys, vlm_dagster.definitions\n"
        f"sys.exit(any(m.split('.')[0] == {module!r} for m in sys.modules))"
    )
    done = run_python("-c", program, home=tmp_path / "home")
    assert done.returncode == 0, f"{module} was imported\n{done.stderr}"


def test_the_location_has_the_same_name_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["dg"]["project"]
    workspace = (ROOT / "workspace.yaml").read_text()
    assert f"location_name: {project['code_location_name']}" in workspace
    assert f"module_name: {project['root_module']}.definitions" in workspace


@pytest.fixture
def definitions(tmp_path: Path) -> dg.Definitions:
    return demo_definitions(default_settings(), tmp_path)


def test_the_graph_goes_from_events_to_an_evaluated_model(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()

    def parents(name: str) -> set[str]:
        return {key.to_user_string() for key in graph.get(dg.AssetKey(name)).parent_keys}

    assert parents("raw_events") == set()
    assert parents("interactions_history") == {"raw_events"}
    assert parents("interactions_pointers") == {"raw_events", "interactions_history"}
    assert parents("ranker") == {"interactions_pointers"}
    assert parents("ranker_evaluation") == {"ranker", "interactions_pointers"}


def test_every_asset_says_what_it_is(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.description, key
        assert len(node.description) > 80, key
        assert node.owners == ["team:recommendations"], key
        assert node.kinds, key
        assert node.group_name == "recommender", key
        assert node.code_version, key


def test_its_schedule_and_its_sensor_are_on(definitions: dg.Definitions) -> None:
    repository = definitions.get_repository_def()
    (schedule,) = repository.schedule_defs
    assert schedule.name == "seal_complete_windows"
    assert schedule.default_status == dg.DefaultScheduleStatus.RUNNING
    (sensor,) = repository.sensor_defs
    assert sensor.name == "train_on_new_pointers"
    assert sensor.default_status == dg.DefaultSensorStatus.RUNNING


def test_without_settings_it_is_about_a_month_of_made_up_events(tmp_path: Path) -> None:
    settings = DemoSettings.load(tmp_path)
    assert settings.group.name == "interactions"
    assert settings.num_windows == 30


def test_settings_come_back_as_they_were_saved(tmp_path: Path) -> None:
    settings = replace(
        default_settings(GeneratorConfig(num_users=10, num_days=3, longest_history=50)),
        max_length=64,
        training={"epochs": 2},
    )
    settings.save(tmp_path / "home")
    assert DemoSettings.load(tmp_path / "home") == settings


def test_the_partitions_are_those_of_the_settings(tmp_path: Path) -> None:
    settings = replace(
        default_settings(),
        cadence="hourly",
        first_window="2025-01-01-00:00",
        end_window="2025-01-01-06:00",
    )
    graph = demo_definitions(settings, tmp_path).resolve_asset_graph()
    partitions = graph.get(dg.AssetKey("interactions_pointers")).partitions_def
    assert partitions is not None
    assert len(partitions.get_partition_keys()) == settings.num_windows == 6


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is not the demo's settings"),
        ("{}", "format version None"),
        (json.dumps({"format_version": 99}), "format version 99"),
    ],
)
def test_damaged_settings_are_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "demo.json").write_text(text)
    with pytest.raises(SchemaError, match=problem):
        DemoSettings.load(tmp_path)


def test_settings_need_a_window() -> None:
    with pytest.raises(SchemaError, match="is not after"):
        replace(default_settings(), end_window="2025-01-01")
