"""Training and evaluation assets: which windows they take, and what they tell when a process fails.

(That they train for real is in test_webserver.py.)
"""

import base64
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster_project import DAYS, Project, failure_of
from hypothesis import given
from hypothesis import strategies as st

from vlm_dagster.assets import evaluation_asset, training, training_asset
from vlm_dagster.assets.figures import loss_figure
from vlm_dagster.assets.processes import steps_of, storage_environment, torchrun_command
from vlm_dagster.assets.training import num_held_out
from vlm_dagster.errors import SchemaError
from vlm_dagster.io_managers import CheckpointRef, VlmCheckpointIOManager

RANKER = dg.AssetKey("ranker")
# Stands in for the training module: writes what it was told to train on, then fails.
FAILING = "import sys; sys.stderr.write('no such luck'); sys.exit(3)"


class TrainingProject(Project):
    def __init__(self, root: Path, **options: Any) -> None:
        super().__init__(root)
        self.ranker = training_asset(
            pointers=self.pointers, options={"group": "ratings"}, eval_share=0.3, **options
        )
        self.evaluation = evaluation_asset(checkpoint=self.ranker, pointers=self.pointers)
        self.resources["checkpoint_io_manager"] = VlmCheckpointIOManager(
            root=str(root / "checkpoints")
        )
        self.resources["io_manager"] = dg.mem_io_manager

    def train(self, **config: Any) -> dg.ExecuteInProcessResult:
        return dg.materialize(
            [self.history, self.pointers, self.ranker, self.evaluation],
            selection=[RANKER],
            instance=self.instance,
            resources=self.resources,
            raise_on_error=False,
            run_config={"ops": {"ranker": {"config": config}}},
        )

    def config(self) -> dict[str, Any]:
        (path,) = (self.root / "checkpoints").rglob("config.json")
        return dict(json.loads(path.read_text()))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainingProject:
    def failing(*args: Any) -> list[str]:
        return [sys.executable, "-c", FAILING]

    monkeypatch.setattr(training, "torchrun_command", failing)
    return TrainingProject(tmp_path)


class TestTheWindowsOfARun:
    def test_the_newest_are_held_out(self, project: TrainingProject) -> None:
        project.materialize(DAYS[0], DAYS[4])
        project.train()
        assert project.config()["train_pointers"]["windows"] == DAYS[:3]
        assert project.config()["train_pointers"]["version"] == 3
        assert project.config()["eval_pointers"] is None

    def test_only_what_is_sealed_is_taken(self, project: TrainingProject) -> None:
        project.materialize(DAYS[0], DAYS[2])
        project.train(eval_share=0.0)
        assert project.config()["train_pointers"]["windows"] == DAYS[:3]

    def test_the_launchpad_chooses(self, project: TrainingProject) -> None:
        project.materialize(DAYS[0], DAYS[4])
        project.train(first_window=DAYS[1], last_window=DAYS[3], options={"epochs": 7})
        assert project.config()["train_pointers"]["windows"] == DAYS[1:4]
        assert project.config()["epochs"] == 7

    def test_none_to_train_on_is_an_error(self, project: TrainingProject) -> None:
        project.materialize(DAYS[0], DAYS[1])
        message, told = failure_of(project.train(first_window="2024-02-01"))
        assert told["error"] == "WindowError"
        assert "no examples to train on among 2 sealed windows" in message

    def test_an_unknown_option_is_an_error(self, project: TrainingProject) -> None:
        project.materialize(DAYS[0])
        message, _ = failure_of(project.train(options={"learning_rat": 1.0}))
        assert "'learning_rat', which is unknown" in message


def test_a_failed_process_tells_its_command_and_config(project: TrainingProject) -> None:
    project.materialize(DAYS[0], DAYS[1])
    result = project.train()
    message, told = failure_of(result)
    assert "training failed (External execution process failed with code 3)" in message
    assert FAILING in told["command"]
    assert json.loads(Path(told["config"]).read_text())["group"] == "ratings"
    assert not list(result.asset_materializations_for_node("ranker"))


def test_evaluation_waits_for_a_checkpoint(project: TrainingProject) -> None:
    project.materialize(DAYS[0], DAYS[1])
    result = dg.materialize(
        [project.history, project.pointers, project.ranker, project.evaluation],
        selection=["ranker_evaluation"],
        instance=project.instance,
        resources=project.resources,
        raise_on_error=False,
    )
    assert "Materialize the training asset first" in failure_of(result)[0]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"options": {"checkpoint_dir": "x"}}, "'checkpoint_dir'"),
        ({"options": {"epoch": 1}}, "'epoch', which is unknown"),
        ({"options": {"epochs": 0}}, "epochs=0"),
        ({"eval_share": 1.0}, "eval_share=1.0"),
        ({"num_processes": 0}, "num_processes=0"),
    ],
)
def test_options_are_checked_when_the_asset_is_defined(
    tmp_path: Path, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(SchemaError, match=problem):
        training_asset(pointers=Project(tmp_path).pointers, **options)


def test_evaluation_changes_only_evaluation_options(tmp_path: Path) -> None:
    project = TrainingProject(tmp_path)
    with pytest.raises(SchemaError, match="'epochs'"):
        evaluation_asset(
            checkpoint=project.ranker, pointers=project.pointers, options={"epochs": 2}
        )


@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=30), share=st.floats(0, 0.99))
def test_as_few_windows_as_can_be_are_held_out(counts: list[int], share: float) -> None:
    num = num_held_out(counts, share)
    held, kept = counts[len(counts) - num :], counts[: len(counts) - num]
    assert len(held) == num
    if num == 0:
        return
    assert sum(kept) > 0
    assert sum(held) >= share * sum(counts)
    assert sum(held[1:]) < share * sum(counts)


def test_the_loss_is_drawn_as_a_picture() -> None:
    text = loss_figure([(1, 9.0), (50, 4.5), (100, 3.0)])
    encoded = text.split("base64,")[1].split(")")[0]
    picture = ET.fromstring(base64.b64decode(encoded))
    assert picture.tag.endswith("svg")
    assert "| loss | 9.0000 |" in text
    assert loss_figure([(1, 9.0)]) == ""


def test_progress_messages_become_points() -> None:
    messages = [
        {"vlm": "progress", "step": 1, "next_item_loss": 2.5},
        {"vlm": "trained"},
        "something else",
    ]
    assert steps_of(messages) == [(1, 2.5)]


def test_credentials_reach_the_processes_through_their_environment() -> None:
    assert storage_environment({"aws_access_key_id": "x"}) == {"AWS_ACCESS_KEY_ID": "x"}
    assert storage_environment(None) == {}


def test_torchrun_starts_as_many_ranks_as_asked_for() -> None:
    command = torchrun_command("some.module", 2, ["--config", "c.json"])
    assert command[:2] == [sys.executable, "-m"]
    assert " ".join(command[2:]) == (
        "torch.distributed.run --standalone --nproc-per-node 2 -m some.module --config c.json"
    )


def test_a_checkpoint_ref_goes_through_json() -> None:
    ref = CheckpointRef("/some/folder", "digest", "weights")
    assert CheckpointRef.from_json(json.loads(json.dumps(ref.to_json()))) == ref
