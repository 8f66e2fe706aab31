"""What starts by itself, what does not, and what is on when the UI starts."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster_project import DAILY, DAYS, RATINGS, SPEC, Project

from vlm_dagster.assets import (
    automation_sensor,
    history_asset,
    history_checks,
    on_new_checkpoint,
    on_new_pointers,
    pointer_asset,
    pointer_checks,
    sealing_schedule,
)
from vlm_dagster.errors import SchemaError

RANKER = dg.AssetKey("ranker")
EVALUATION = dg.AssetKey("ranker_evaluation")
OPEN_ENDED = dg.DailyPartitionsDefinition("2024-01-01")


class Automated(Project):
    """The project with stand-ins for the two processes that take long."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        every = dg.AssetIn(key=self.pointers.key, partition_mapping=dg.AllPartitionMapping())

        @dg.asset(name="ranker", ins={"pointers": every}, automation_condition=on_new_pointers())
        def ranker(pointers: Any) -> int:
            return len(pointers.windows)

        @dg.asset(
            name="ranker_evaluation",
            ins={"pointers": every},
            deps=[ranker],
            automation_condition=on_new_checkpoint(RANKER),
        )
        def evaluation(pointers: Any) -> int:
            return len(pointers.windows)

        self.models = [ranker, evaluation]
        self.cursor: Any = None

    @property
    def definitions(self) -> dg.Definitions:
        return dg.Definitions(
            assets=[self.history, self.pointers, *self.models],
            asset_checks=self.checks,
            resources={**self.resources, "io_manager": dg.mem_io_manager},
        )

    def tick(self) -> set[dg.AssetKey]:
        """What one look of the automation sensor asks for."""
        result = dg.evaluate_automation_conditions(
            self.definitions, instance=self.instance, cursor=self.cursor
        )
        self.cursor = result.cursor
        return {key for key in (RANKER, EVALUATION) if result.get_num_requested(key)}

    def train(self) -> None:
        assert dg.materialize(
            [self.history, self.pointers, *self.models],
            selection=[RANKER, EVALUATION],
            instance=self.instance,
            resources={**self.resources, "io_manager": dg.mem_io_manager},
        ).success


@pytest.fixture
def project(tmp_path: Path) -> Automated:
    return Automated(tmp_path)


pytestmark = pytest.mark.filterwarnings("ignore::dagster.BetaWarning")


class TestTraining:
    def test_starts_when_new_pointers_are_ready_and_evaluation_follows(
        self, project: Automated
    ) -> None:
        assert project.tick() == set()
        project.materialize(DAYS[0])
        assert project.tick() == {RANKER, EVALUATION}

    def test_does_not_start_on_finished_work_when_the_ui_opens(self, project: Automated) -> None:
        project.materialize(DAYS[0], DAYS[4])
        project.train()
        assert project.tick() == set()
        assert project.tick() == set()

    def test_does_not_start_because_something_is_missing(self, project: Automated) -> None:
        project.materialize(DAYS[0], only=[project.history])
        assert project.tick() == set()
        assert project.tick() == set()

    def test_does_not_start_again_for_the_same_content(self, project: Automated) -> None:
        project.tick()
        project.materialize(DAYS[0])
        assert RANKER in project.tick()
        project.train()
        project.tick()
        project.materialize(DAYS[0])
        assert project.tick() == set()
        project.materialize(DAYS[0], DAYS[0])  # as a run over a range, too
        assert project.tick() == set()

    def test_starts_once_for_a_run_over_many_windows(self, project: Automated) -> None:
        project.tick()
        project.materialize(DAYS[0], DAYS[3])
        assert RANKER in project.tick()
        project.train()
        assert project.tick() == set()

    def test_does_not_start_on_pointers_whose_checks_failed(
        self, project: Automated, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from vlm_dagster.assets import checks
        from vlm_dagster.assets.reference import LeakageReport

        project.tick()
        with monkeypatch.context() as patch:
            patch.setattr(checks, "find_leaks", lambda *a, **k: LeakageReport(1, 1, ("planted",)))
            assert not project.materialize(DAYS[0]).success
        assert project.tick() == set()
        assert project.materialize(DAYS[1]).success
        assert RANKER in project.tick()


class Scheduled:
    """The assets over live partitions, with a schedule."""

    def __init__(self, root: Path, partitions_def: dg.TimeWindowPartitionsDefinition) -> None:
        project = Project(root)
        history = history_asset(
            RATINGS, events=project.source.events, partitions_def=partitions_def, num_buckets=2
        )
        pointers = pointer_asset(
            SPEC,
            requests=project.source.requests,
            histories=[history],
            partitions_def=partitions_def,
            num_buckets=2,
        )
        self.schedule = sealing_schedule([history, pointers], max_windows=3)
        self.definitions = dg.Definitions(
            assets=[history, pointers],
            asset_checks=[*history_checks(history), *pointer_checks(pointers)],
            schedules=[self.schedule],
            resources=project.resources,
        )
        self.instance = dg.DagsterInstance.local_temp(str(root))

    def tick(self, when: str) -> Any:
        moment = datetime.fromisoformat(when).replace(tzinfo=UTC)
        with dg.build_schedule_context(
            instance=self.instance,
            scheduled_execution_time=moment,
            repository_def=self.definitions.get_repository_def(),
        ) as context:
            return self.schedule.evaluate_tick(context)

    def run(self, request: Any) -> None:
        result = self.definitions.resolve_job_def("seal_complete_windows_job").execute_in_process(
            instance=self.instance, partition_key=request.partition_key, tags=request.tags
        )
        assert result.success
        assert len(list(result.get_asset_check_evaluations())) == 4


class TestSchedule:
    def test_seals_the_oldest_missing_windows_in_one_run(self, tmp_path: Path) -> None:
        live = Scheduled(tmp_path, OPEN_ENDED)
        (request,) = live.tick("2024-01-06T00:15:00").run_requests
        assert request.tags["dagster/asset_partition_range_start"] == "2024-01-01"
        assert request.tags["dagster/asset_partition_range_end"] == "2024-01-03"
        live.run(request)
        (request,) = live.tick("2024-01-07T00:15:00").run_requests
        assert request.tags["dagster/asset_partition_range_start"] == "2024-01-04"
        assert request.tags["dagster/asset_partition_range_end"] == "2024-01-06"
        live.run(request)
        (request,) = live.tick("2024-01-08T00:15:00").run_requests
        assert request.partition_key == "2024-01-07"
        live.run(request)
        skipped = live.tick("2024-01-08T12:00:00")
        assert skipped.run_requests == []
        assert "Every complete window is sealed (the last one is 2024-01-07)" in (
            skipped.skip_message
        )

    def test_skips_where_the_partitions_have_ended(self, tmp_path: Path) -> None:
        skipped = Scheduled(tmp_path, DAILY).tick("2026-05-05T00:15:00")
        assert skipped.run_requests == []
        assert "The partitions ended at 2024-01-06 00:00 UTC" in skipped.skip_message

    def test_waits_for_the_run_of_an_earlier_tick(self, tmp_path: Path) -> None:
        live = Scheduled(tmp_path, OPEN_ENDED)
        live.instance.add_run(
            dg.DagsterRun(job_name="seal_complete_windows_job", status=dg.DagsterRunStatus.STARTED)
        )
        assert "has not ended" in live.tick("2024-01-03T00:15:00").skip_message

    @pytest.mark.parametrize(
        ("partitions_def", "delay", "cron"),
        [
            (dg.HourlyPartitionsDefinition("2024-01-01-00:00"), 5, "5 * * * *"),
            (dg.DailyPartitionsDefinition("2024-01-01"), 90, "30 1 * * *"),
            (dg.WeeklyPartitionsDefinition("2024-01-07"), 15, "15 0 * * 0"),
        ],
    )
    def test_follows_the_cadence_of_the_windows(
        self, partitions_def: Any, delay: int, cron: str
    ) -> None:
        asset = history_asset(RATINGS, events=lambda window: None, partitions_def=partitions_def)
        assert sealing_schedule([asset], delay_minutes=delay).cron_schedule == cron

    def test_refuses_assets_of_different_partitions(self) -> None:
        def asset(name: str, start: str) -> dg.AssetsDefinition:
            return history_asset(
                RATINGS,
                name=name,
                events=lambda window: None,
                partitions_def=dg.DailyPartitionsDefinition(start),
            )

        with pytest.raises(SchemaError, match="different partitions"):
            sealing_schedule([asset("a", "2024-01-01"), asset("b", "2024-02-01")])
        with pytest.raises(SchemaError, match="no partitioned assets"):
            sealing_schedule([])
        with pytest.raises(SchemaError, match="delay_minutes=1440"):
            sealing_schedule([asset("a", "2024-01-01")], delay_minutes=1440)


def test_both_are_on_when_the_ui_starts(project: Automated) -> None:
    schedule = sealing_schedule([project.history, project.pointers])
    assert schedule.default_status == dg.DefaultScheduleStatus.RUNNING
    assert schedule.execution_timezone == "UTC"
    sensor = automation_sensor(project.models)
    assert sensor.default_status == dg.DefaultSensorStatus.RUNNING
