"""Asset checks find planted damage, block what is downstream, and stay within the run's partitions."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest
from dagster_project import DAYS, HISTORY, POINTERS, Project

from vlm_dagster.assets import history_checks, pointer_checks
from vlm_dagster.assets.reference import _problem
from vlm_dagster.errors import SchemaError
from vlm_dagster.history import HistoryStore
from vlm_dagster.pointers import PointerDataset, PointerSnapshot
from vlm_dagster.pointers.build import PointerBuilder


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def evaluations(result: dg.ExecuteInProcessResult) -> dict[tuple[dg.AssetKey, str], Any]:
    return {
        (found.asset_key, found.check_name): found for found in result.get_asset_check_evaluations()
    }


def run_checks(project: Project, key: dg.AssetKey) -> dict[str, Any]:
    """Run the checks of an asset alone, as from the UI: without partitions."""
    result = dg.materialize(
        [project.history, project.pointers, *project.checks],
        selection=dg.AssetSelection.checks_for_assets(key),
        instance=project.instance,
        resources=project.resources,
        raise_on_error=False,
    )
    return {name: found for (_, name), found in evaluations(result).items()}


def file_of(root: Path, table: str, day: str) -> Path:
    return sorted((root / table / f"segment={day}").rglob("*.parquet"))[0]


def test_all_checks_pass_on_what_was_just_sealed(project: Project) -> None:
    found = evaluations(project.materialize(DAYS[0]))
    assert {key: e.passed for key, e in found.items()} == {
        (HISTORY, "sealed_files_intact"): True,
        (POINTERS, "sealed_files_intact"): True,
        (POINTERS, "within_watermark"): True,
        (POINTERS, "no_leakage"): True,
    }
    assert found[POINTERS, "no_leakage"].metadata["num_examples"].value == 3
    assert found[HISTORY, "sealed_files_intact"].metadata["num_rows"].value == 3


def test_all_checks_block(project: Project) -> None:
    specs = [spec for definition in project.checks for spec in definition.check_specs]
    assert len(specs) == 4
    assert all(spec.blocking for spec in specs)


def test_checks_of_a_partitioned_run_look_at_its_partitions_only(project: Project) -> None:
    found = evaluations(project.materialize(DAYS[0], DAYS[3]))
    assert found[HISTORY, "sealed_files_intact"].metadata["num_windows"].value == 4
    found = evaluations(project.materialize(DAYS[4]))
    assert found[HISTORY, "sealed_files_intact"].metadata["num_windows"].value == 1
    assert found[POINTERS, "within_watermark"].metadata["num_windows"].value == 1


def test_checks_run_alone_look_at_every_sealed_window(project: Project) -> None:
    project.materialize(DAYS[0], DAYS[2])
    assert run_checks(project, HISTORY)["sealed_files_intact"].metadata["num_windows"].value == 3
    assert run_checks(project, POINTERS)["no_leakage"].metadata["num_examples"].value == 9


@pytest.mark.parametrize("damage", ["cut short", "missing", "one bit flipped"])
def test_a_damaged_history_file_is_found_and_blocks_the_pointers(
    project: Project, damage: str
) -> None:
    project.materialize(DAYS[0], only=[project.history])
    path = file_of(project.root, "ratings_history", DAYS[0])
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut short":
        path.write_bytes(content[:-100])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    result = project.materialize(DAYS[0], on_sealed="REUSE")
    assert not result.success
    found = evaluations(result)[HISTORY, "sealed_files_intact"]
    assert not found.passed
    assert path.name in found.description
    assert "Restore the file from a copy" in found.description
    executed = {event.step_key for event in result.all_events if event.is_step_success}
    assert "next_item_pointers" not in executed


def test_a_damaged_pointer_file_is_found(project: Project) -> None:
    project.materialize(DAYS[0])
    path = file_of(project.root, "next_item_pointers", DAYS[0])
    path.write_bytes(path.read_bytes()[:-50])
    found = run_checks(project, POINTERS)
    assert not found["sealed_files_intact"].passed
    assert not found["no_leakage"].passed  # what cannot be read has failed too


def test_a_vanished_table_fails_the_check_with_its_address(project: Project) -> None:
    project.materialize(DAYS[0])
    shutil.rmtree(project.root / "ratings_history")
    found = run_checks(project, HISTORY)["sealed_files_intact"]
    assert not found.passed
    assert str(project.root / "ratings_history") in found.description
    found = run_checks(project, POINTERS)["within_watermark"]
    assert not found.passed


class TestPlantedLeaks:
    """What a wrong builder of pointers would seal."""

    @pytest.fixture
    def shifted(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        right = PointerBuilder._end_positions

        def shift(by: int) -> None:
            def wrong(self: PointerBuilder, *args: Any) -> Any:
                return np.maximum(right(self, *args) + by, 0)

            monkeypatch.setattr(PointerBuilder, "_end_positions", wrong)

        return shift

    def test_a_pointer_one_event_too_far_is_found_and_fails_the_run(
        self, project: Project, shifted: Any
    ) -> None:
        shifted(1)
        result = project.materialize(DAYS[0])
        assert not result.success
        found = evaluations(result)
        assert found[POINTERS, "sealed_files_intact"].passed
        assert not found[POINTERS, "no_leakage"].passed
        description = found[POINTERS, "no_leakage"].description
        assert "the pointer ends at position 1, but only 0 events were available" in description
        assert "it leaks" in description
        assert found[POINTERS, "no_leakage"].metadata["num_problems"].value == 3

    def test_a_pointer_that_stops_too_early_is_found(self, project: Project, shifted: Any) -> None:
        shifted(-1)
        found = evaluations(project.materialize(DAYS[0], DAYS[1]))[POINTERS, "no_leakage"]
        assert not found.passed
        assert "it is incomplete" in found.description

    def test_a_request_past_the_watermark_of_its_pin_is_found(
        self, project: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        project.materialize(DAYS[0])
        right = PointerSnapshot.pins_of

        def earlier(self: PointerSnapshot, window: str) -> Any:
            early = self.windows[0].window.start_us
            return {g: replace(pin, watermark_us=early) for g, pin in right(self, window).items()}

        monkeypatch.setattr(PointerSnapshot, "pins_of", earlier)
        found = run_checks(project, POINTERS)["within_watermark"]
        assert not found.passed
        assert "a request at 2024-01-01T23:00:00Z" in found.description
        assert "is complete up to 2024-01-01T00:00:00Z" in found.description


def test_checks_belong_to_what_the_factories_made(project: Project) -> None:
    with pytest.raises(SchemaError, match="not made by history_asset"):
        history_checks(project.pointers)
    with pytest.raises(SchemaError, match="not made by pointer_asset"):
        pointer_checks(project.history)


def test_what_was_erased_dropped_or_collected_leaks_nothing(project: Project) -> None:
    project.materialize(DAYS[0], DAYS[4])
    history = HistoryStore.open(project.root / "ratings_history")
    pointers = PointerDataset.open(project.root / "next_item_pointers")

    def assert_all_pass() -> None:
        found = {**run_checks(project, HISTORY), **run_checks(project, POINTERS)}
        assert {name: e.description for name, e in found.items() if not e.passed} == {}
        assert found["no_leakage"].metadata["num_examples"].value > 5

    assert_all_pass()
    history.erase([2], reason="ticket 7")
    assert_all_pass()  # the examples are still there, and point at what is gone
    pointers.erase([2], reason="ticket 7")
    assert_all_pass()
    history.drop_before(DAYS[2])
    history.gc(dry_run=False, keep_hours=0, move_pins=True, let_dropped_go=True)
    assert_all_pass()
    # And a pointer that does leak is still found among what is left.
    rows = pointers.snapshot([DAYS[4]]).to_table().to_pylist()
    (row, *_) = [r for r in rows if r["user_id"] == 1]
    row["request_time"] = int(row["request_time"].timestamp() * 1e6)
    events = [(t, i) for i, t in enumerate(range(row["request_time"] - 5, row["request_time"]))]
    row |= {"ratings_end_position": 9, "ratings_length": 9, "request_id": -1}
    assert _problem(row, "ratings", events, 4, None, True) is None
    assert "it leaks" in (_problem(row, "ratings", events, 3, None, True) or "")
    assert "incomplete" in (_problem(row, "ratings", events, 5, None, True) or "")
    own = {**row, "request_id": 4}
    assert "its own history" in (_problem(own, "ratings", events, 4, None, True) or "")
    longer = {**row, "ratings_length": 10}
    assert "spans 10 events" in (_problem(longer, "ratings", events, 4, None, True) or "")
