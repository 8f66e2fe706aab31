"""IO managers commit what was staged and load frozen handles, without a word about credentials."""

import json
import pickle
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster_project import DAILY, DAYS, HISTORY, POINTERS, RATINGS, Project, failure_of

from vlm_dagster.history import HistoryStore, SnapshotRef
from vlm_dagster.io_managers import (
    CheckpointRef,
    VlmCheckpointIOManager,
    VlmHistoryIOManager,
    VlmPointerIOManager,
)
from vlm_dagster.pointers import PointerRef
from vlm_dagster.windows import WindowGrid


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def load(manager: Any, key: dg.AssetKey, first: str, last: str | None = None) -> Any:
    span = dg.PartitionKeyRange(first, last or first)
    with dg.build_input_context(
        asset_key=key, asset_partitions_def=DAILY, asset_partition_key_range=span
    ) as context:
        return manager.load_input(context)


class TestHistories:
    def test_one_partition_loads_as_the_snapshot_that_first_covers_it(
        self, project: Project
    ) -> None:
        project.materialize(DAYS[0], DAYS[3])
        ref = load(project.resources["history_io_manager"], HISTORY, DAYS[1])
        assert isinstance(ref, SnapshotRef)
        assert ref.version == 2
        assert [sealed.window.key for sealed in ref.open().windows] == DAYS[:2]

    def test_a_handle_is_frozen_and_picklable(self, project: Project) -> None:
        project.materialize(DAYS[0])
        ref = load(project.resources["history_io_manager"], HISTORY, DAYS[0])
        assert pickle.loads(pickle.dumps(ref)) == ref
        assert SnapshotRef.from_json(json.loads(json.dumps(ref.to_json()))) == ref
        with pytest.raises(FrozenInstanceError):
            ref.version = 9

    def test_many_partitions_load_as_a_dict(self, project: Project) -> None:
        project.materialize(DAYS[0], DAYS[3])
        refs = load(project.resources["history_io_manager"], HISTORY, DAYS[1], DAYS[3])
        assert {day: ref.version for day, ref in refs.items()} == {
            DAYS[1]: 2,
            DAYS[2]: 3,
            DAYS[3]: 4,
        }

    def test_later_commits_do_not_move_a_handle(self, project: Project) -> None:
        project.materialize(DAYS[0], DAYS[1])
        manager = project.resources["history_io_manager"]
        before = load(manager, HISTORY, DAYS[1])
        project.materialize(DAYS[2], DAYS[4])
        assert load(manager, HISTORY, DAYS[1]) == before

    def test_what_is_not_covered_says_which_windows_lack(self, project: Project) -> None:
        project.materialize(DAYS[0], only=[project.history])
        project.materialize(DAYS[2], only=[project.history])
        with pytest.raises(dg.Failure) as caught:
            load(project.resources["history_io_manager"], HISTORY, DAYS[2])
        assert f"Windows not sealed yet: {DAYS[1]}" in (caught.value.description or "")
        assert not caught.value.allow_retries

    def test_a_table_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(dg.Failure, match="there is no Delta table here"):
            load(VlmHistoryIOManager(root=str(tmp_path)), HISTORY, DAYS[0])

    def test_upstream_without_partitions_cannot_be_windows(self, project: Project) -> None:
        project.materialize(DAYS[0])
        with (
            dg.build_input_context(asset_key=HISTORY) as context,
            pytest.raises(dg.Failure, match="has no partitions"),
        ):
            project.resources["history_io_manager"].load_input(context)


class TestAnAssetOfOnesOwn:
    """What a user writes who needs no factory."""

    def run(self, manager: VlmHistoryIOManager, compute: Any) -> dg.ExecuteInProcessResult:
        @dg.asset(name="ratings_history", partitions_def=DAILY, io_manager_key="history")
        def own(context: dg.AssetExecutionContext) -> dg.MaterializeResult[Any]:
            return dg.MaterializeResult(value=compute(context.partition_key))

        return dg.materialize(
            [own], partition_key=DAYS[0], resources={"history": manager}, raise_on_error=False
        )

    def test_returns_what_stage_gave(self, project: Project) -> None:
        manager = VlmHistoryIOManager(root=str(project.root))
        store = HistoryStore.create(manager.table_uri(HISTORY), RATINGS, 2)

        def compute(key: str) -> Any:
            return store.stage(key, project.source.events(store.grid.parse(key)))

        result = self.run(manager, compute)
        assert result.success
        (materialization,) = result.asset_materializations_for_node("ratings_history")
        assert materialization.metadata["dagster/row_count"].value == 3

    def test_cannot_commit_another_partition(self, project: Project) -> None:
        manager = VlmHistoryIOManager(root=str(project.root))
        store = HistoryStore.create(manager.table_uri(HISTORY), RATINGS, 2)

        def compute(key: str) -> Any:
            return store.stage(DAYS[3], project.source.events(store.grid.parse(DAYS[3])))

        message, _ = failure_of(self.run(manager, compute))
        assert f"window '{DAYS[3]}' was staged in a run of partition {DAYS[0]}" in message
        assert store.sealed_windows() == []

    def test_cannot_return_a_table(self, project: Project) -> None:
        manager = VlmHistoryIOManager(root=str(project.root))
        HistoryStore.create(manager.table_uri(HISTORY), RATINGS, 2)
        result = self.run(manager, lambda key: project.source.events(WindowGrid().parse(key)))
        message, told = failure_of(result)
        assert told["error"] == "SchemaError"
        assert "got a Table, not staged windows" in message


class TestPointers:
    def test_load_as_one_ref_at_the_version_that_sealed_the_newest(self, project: Project) -> None:
        project.materialize(DAYS[0], DAYS[3])
        ref = load(project.resources["pointer_io_manager"], POINTERS, DAYS[0], DAYS[2])
        assert isinstance(ref, PointerRef)
        assert ref.windows == tuple(DAYS[:3])
        assert ref.version == 3
        assert [pin.version for pin in ref.pins] == [1, 2, 3]
        assert pickle.loads(pickle.dumps(ref)) == ref

    def test_partitions_that_are_not_sealed_are_left_out(self, project: Project) -> None:
        project.materialize(DAYS[0], DAYS[1])
        ref = load(project.resources["pointer_io_manager"], POINTERS, DAYS[0], DAYS[4])
        assert ref.windows == tuple(DAYS[:2])

    def test_a_single_partition_has_to_be_sealed(self, project: Project) -> None:
        project.materialize(DAYS[0])
        with pytest.raises(dg.Failure, match="has no sealed window"):
            load(project.resources["pointer_io_manager"], POINTERS, DAYS[2])


class TestAddresses:
    def test_an_asset_lies_under_the_root(self, tmp_path: Path) -> None:
        manager = VlmPointerIOManager(root=f"{tmp_path}/")
        assert manager.table_uri(dg.AssetKey(["a", "b"])) == f"{tmp_path}/a/b"

    def test_unless_it_lies_elsewhere(self, tmp_path: Path) -> None:
        manager = VlmHistoryIOManager(
            root="s3://bucket/tables", table_uris={"a/b": str(tmp_path / "here")}
        )
        assert manager.table_uri(dg.AssetKey(["a", "b"])) == str(tmp_path / "here")
        assert manager.table_uri(dg.AssetKey("c")) == "s3://bucket/tables/c"


class TestCredentials:
    def test_come_from_the_environment_and_are_shown_nowhere(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SOME_SECRET", "hunter2")
        seen: list[dict[str, str] | None] = []
        original = VlmHistoryIOManager.create_store

        def spy(self: VlmHistoryIOManager, *args: Any, **kwargs: Any) -> HistoryStore:
            seen.append(self.options)
            assert "hunter2" not in repr(self)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(VlmHistoryIOManager, "create_store", spy)
        project = Project(tmp_path)
        options: Any = {"aws_secret_access_key": dg.EnvVar("SOME_SECRET")}
        for name, kind in (
            ("history_io_manager", VlmHistoryIOManager),
            ("pointer_io_manager", VlmPointerIOManager),
        ):
            project.resources[name] = kind(root=str(tmp_path), storage_options=options)
        result = project.materialize(DAYS[0])
        assert result.success
        assert seen == [{"aws_secret_access_key": "hunter2"}]
        for event in result.all_events:
            assert "hunter2" not in repr(event)
        for record in project.instance.all_logs(result.run_id):
            assert "hunter2" not in str(record)
        for path in tmp_path.rglob("*"):
            if path.is_file():
                assert b"hunter2" not in path.read_bytes(), path

    def test_do_not_stand_in_addresses(self) -> None:
        from vlm_dagster.errors import TableError

        manager = VlmHistoryIOManager(root="s3://key:secret@bucket/tables")
        with pytest.raises(TableError) as caught:
            manager.table_uri(HISTORY)
        assert "secret" not in str(caught.value)


class TestCheckpoints:
    def test_only_a_checkpoint_is_taken(self, tmp_path: Path) -> None:
        manager = VlmCheckpointIOManager(root=str(tmp_path))
        with dg.build_output_context(asset_key=dg.AssetKey("ranker")) as context:
            with pytest.raises(dg.Failure, match="got a int"):
                manager.handle_output(context, 1)
            with pytest.raises(dg.Failure, match="cannot be read"):
                manager.handle_output(context, CheckpointRef(str(tmp_path / "none"), "a", "b"))

    def test_none_is_loaded_before_training(self, tmp_path: Path) -> None:
        manager = VlmCheckpointIOManager(root=str(tmp_path))
        with (
            dg.build_input_context(asset_key=dg.AssetKey("ranker")) as context,
            pytest.raises(dg.Failure, match="Materialize the training asset first"),
        ):
            manager.load_input(context)


@pytest.mark.parametrize("kind", [VlmHistoryIOManager, VlmPointerIOManager, VlmCheckpointIOManager])
def test_every_field_is_described_and_the_description_is_markdown(kind: Any) -> None:
    description = kind(root="somewhere").get_resource_definition().description
    assert description
    assert "\n    " not in description
    assert all(field.description for field in kind.model_fields.values())
