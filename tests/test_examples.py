"""The examples run as they stand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_library_alone(tmp_path: Path) -> None:
    printed = run(str(EXAMPLES / "without_dagster.py"), str(tmp_path))
    assert "newest two of user 1: [11, 12]" in printed
    assert "user 1: [10, 11] -> 12" in printed
    assert "user 2: [20] -> 21" in printed


def test_a_project_of_ones_own_trains_a_model(tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    run("-m", "vlm_dagster", "generate", str(lake), "--users", "60", "--items", "200",
        "--days", "4", "--longest", "60")  # fmt: skip
    home = tmp_path / "dagster"
    home.mkdir()
    definitions = str(EXAMPLES / "recommender" / "definitions.py")
    common = {"LAKE": str(lake), "DAGSTER_HOME": str(home), "DAGSTER_DISABLE_TELEMETRY": "1"}
    materialize = ("-m", "dagster", "asset", "materialize", "-f", definitions)
    run(*materialize, "--select", "interactions_history,next_item_pointers",
        "--partition-range", "2025-01-01...2025-01-04", **common)  # fmt: skip
    config = {"ops": {"ranker": {"config": {"options": {"max_steps": 5}}}}}
    run(*materialize, "--select", "ranker,ranker_evaluation",
        "--config-json", json.dumps(config), **common)  # fmt: skip
    (checkpoint,) = (lake / "checkpoints" / "ranker").glob("*/checkpoint.json")
    traced = json.loads(run("-m", "vlm_dagster", "lineage", "--json", str(checkpoint.parent)))
    (pointers,) = traced["from"]
    assert pointers["uri"] == str(lake / "tables" / "next_item_pointers")
    assert [source["group"] for source in pointers["from"]] == ["interactions"] * len(
        pointers["from"]
    )
    assert all("problem" not in source for source in pointers["from"])
    run("-m", "vlm_dagster", "verify", "--deep", str(checkpoint.parent))
