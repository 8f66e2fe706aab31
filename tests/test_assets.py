"""History and pointer assets, materialized for real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from dagster_project import DAILY, DAYS, HISTORY, POINTERS, RATINGS, SPEC, Project, failure_of

from vlm_dagster.assets import history_asset, pointer_asset
from vlm_dagster.errors import SchemaError
from vlm_dagster.history import HistoryStore
from vlm_dagster.pointers import PointerDataset, PointerSpec
from vlm_dagster.windows import Window


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_a_partition_is_sealed_and_its_pointers_are_built_in_one_run(project: Project) -> None:
    assert project.materialize(DAYS[0]).success
    facts = project.facts(HISTORY, DAYS[0])
    store = HistoryStore.open(project.root / "ratings_history")
    (window,) = store.snapshot().windows
    assert window.window.key == DAYS[0]
    assert project.data_version(HISTORY, DAYS[0]) == window.digest == facts["digest"]
    assert facts["dagster/uri"] == store.uri
    assert facts["dagster/row_count"] == 3
    assert facts["num_users"] == 2
    assert facts["version"] == 1
    assert facts["watermark"] == "2024-01-02T00:00:00Z"
    assert facts["reused"] is False
    assert facts["num_duplicates_dropped"] == 0
    assert facts["num_bytes_written"] > 0
    columns = [column.name for column in facts["dagster/column_schema"].columns]
    assert columns == ["user_id", "event_id", "event_time", "available_at", "item_id", "stars"]


def test_pointers_tell_the_pins_of_every_history(project: Project) -> None:
    project.materialize(DAYS[0])
    facts = project.facts(POINTERS, DAYS[0])
    snapshot = HistoryStore.open(project.root / "ratings_history").snapshot()
    assert facts["pins"] == {
        "ratings": {
            "uri": snapshot.uri,
            "table_id": snapshot.ref().table_id,
            "group": "ratings",
            "version": 1,
            "watermark": "2024-01-02T00:00:00Z",
            "digest": snapshot.digest,
        }
    }
    assert facts["dagster/row_count"] == 3
    assert facts["num_empty_examples"] == 2  # the first of each of the two users


def test_code_versions_and_the_digests_of_upstream_are_recorded(project: Project) -> None:
    project.materialize(DAYS[0])
    tags = project.latest(POINTERS, DAYS[0]).tags or {}
    assert tags["dagster/code_version"] == project.pointers.code_versions_by_key[POINTERS]
    assert project.history.code_versions_by_key[HISTORY] is not None
    assert "dagster/input_data_version/ratings_history" in tags


def test_a_declaration_that_changes_changes_the_code_version() -> None:
    def version(**options: int) -> str | None:
        asset = history_asset(RATINGS, events=lambda window: None, partitions_def=DAILY, **options)
        return asset.code_versions_by_key[HISTORY]

    assert version() == version()
    assert version() != version(num_buckets=3)


def test_the_same_content_again_is_green_and_changes_nothing(project: Project) -> None:
    project.materialize(DAYS[0])
    before = project.data_version(HISTORY, DAYS[0]), project.data_version(POINTERS, DAYS[0])
    assert project.materialize(DAYS[0]).success
    assert (
        project.data_version(HISTORY, DAYS[0]),
        project.data_version(POINTERS, DAYS[0]),
    ) == before
    for key in (HISTORY, POINTERS):
        facts = project.facts(key, DAYS[0])
        assert facts["reused"] is True
        assert facts["version"] == 1
        assert facts["num_bytes_written"] == 0
    assert HistoryStore.open(project.root / "ratings_history").snapshot().version == 1


def test_other_content_fails_naming_both_digests_and_the_way_out(project: Project) -> None:
    project.materialize(DAYS[0])
    sealed = project.data_version(HISTORY, DAYS[0])
    project.source.shift = 1
    result = project.materialize(DAYS[0])
    assert not result.success
    message, told = failure_of(result)
    assert told["error"] == "WindowSealedError"
    assert told["window"] == DAYS[0]
    assert told["sealed_digest"] == sealed
    assert told["offered_digest"] != sealed
    assert sealed in message
    assert told["offered_digest"] in message
    assert "A sealed window never changes" in message
    assert "vlm-dagster correct" in message
    assert project.data_version(HISTORY, DAYS[0]) == sealed


def test_a_correction_with_a_reason_makes_the_next_revision(project: Project) -> None:
    project.materialize(DAYS[0], DAYS[2])
    before = project.data_version(HISTORY, DAYS[1])
    project.source.shift = 1
    assert not project.materialize(DAYS[1], only=[project.history]).success
    done = project.materialize(DAYS[1], only=[project.history], correct_because="ticket 12")
    assert done.success
    assert project.data_version(HISTORY, DAYS[1]) != before
    facts = project.facts(HISTORY, DAYS[1])
    assert (facts["revision"], facts["reused"]) == (2, False)
    store = HistoryStore.open(project.root / "ratings_history")
    assert store.snapshot().windows[1].facts["reason"] == "ticket 12"
    # Without a reason, what is sealed now is reused again.
    assert project.materialize(DAYS[1], only=[project.history]).success
    assert project.facts(HISTORY, DAYS[1])["reused"] is True


def test_a_source_without_erased_users_is_still_the_same_window(project: Project) -> None:
    project.materialize(DAYS[0], only=[project.history])
    HistoryStore.open(project.root / "ratings_history").erase([2], reason="ticket 13")
    for without in (set(), {2}):
        project.source.without = without
        assert project.materialize(DAYS[0], only=[project.history]).success
        assert project.facts(HISTORY, DAYS[0])["reused"] is True
    project.source.without = {1}
    assert not project.materialize(DAYS[0], only=[project.history]).success


def test_other_content_in_one_window_of_many_commits_none_of_them(project: Project) -> None:
    project.materialize(DAYS[1], only=[project.history])
    project.source.shift = 1
    result = project.materialize(DAYS[0], DAYS[2], only=[project.history])
    assert failure_of(result)[1]["window"] == DAYS[1]
    store = HistoryStore.open(project.root / "ratings_history")
    assert [sealed.window.key for sealed in store.sealed_windows()] == [DAYS[1]]


def test_reuse_does_not_read_the_source_of_a_sealed_window(tmp_path: Path) -> None:
    project = Project(tmp_path, on_sealed="reuse")
    project.materialize(DAYS[0], only=[project.history])
    project.source.num_reads = 0
    project.source.shift = 1
    assert project.materialize(DAYS[0], only=[project.history]).success
    assert project.source.num_reads == 0
    assert project.facts(HISTORY, DAYS[0])["reused"] is True
    assert project.facts(HISTORY, DAYS[0])["dagster/row_count"] == 3
    assert project.facts(HISTORY, DAYS[0])["num_users"] == 2


def test_the_launchpad_chooses_for_one_run(project: Project) -> None:
    project.materialize(DAYS[0])
    project.source.shift = 1
    assert project.materialize(DAYS[0], on_sealed="REUSE").success
    assert not project.materialize(DAYS[0], on_sealed="VERIFY").success


def test_one_run_over_many_partitions_keeps_one_data_version_each(project: Project) -> None:
    assert project.materialize(DAYS[0], DAYS[4]).success
    windows = HistoryStore.open(project.root / "ratings_history").snapshot().windows
    versions = {day: project.data_version(HISTORY, day) for day in DAYS}
    assert versions == {sealed.window.key: sealed.digest for sealed in windows}
    assert len(set(versions.values())) == 5
    assert [project.facts(HISTORY, day)["version"] for day in DAYS] == [1, 2, 3, 4, 5]
    assert [project.facts(POINTERS, day)["pins"]["ratings"]["version"] for day in DAYS] == [
        *(1, 2, 3, 4, 5)
    ]
    pointers = {day: project.data_version(POINTERS, day) for day in DAYS}
    dataset = PointerDataset.open(project.root / "next_item_pointers").snapshot()
    assert pointers == {sealed.window.key: sealed.digest for sealed in dataset.windows}


def test_one_run_over_all_and_a_run_each_give_the_same(tmp_path: Path) -> None:
    together, apart = Project(tmp_path / "together"), Project(tmp_path / "apart")
    together.materialize(DAYS[0], DAYS[3])
    for day in DAYS[:4]:
        assert apart.materialize(day).success
    for key in (HISTORY, POINTERS):
        for day in DAYS[:4]:
            assert together.data_version(key, day) == apart.data_version(key, day)
    for day in DAYS[:4]:
        mine, theirs = together.facts(HISTORY, day), apart.facts(HISTORY, day)
        varying = {"dagster/uri", "table_id", "watermark"}
        assert {k: v for k, v in mine.items() if k not in varying} == {
            k: v for k, v in theirs.items() if k not in varying
        }


def test_a_backfill_leaves_no_partition_stale(project: Project) -> None:
    from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
    from dagster._core.loader import LoadingContextForTest

    project.materialize(DAYS[0], DAYS[2])
    graph = project.definitions.resolve_asset_graph()
    resolver = CachingStaleStatusResolver(
        project.instance, graph, LoadingContextForTest(project.instance)
    )
    for key in (HISTORY, POINTERS):
        for day in DAYS[:3]:
            assert resolver.get_status(key, day) == StaleStatus.FRESH


def test_windows_may_come_in_any_order_but_pointers_wait_for_the_gap(project: Project) -> None:
    assert project.materialize(DAYS[1], only=[project.history]).success
    result = project.materialize(DAYS[1], only=[project.pointers])
    message, told = failure_of(result)
    assert told["error"] == "WatermarkError"
    assert f"Windows not sealed yet: {DAYS[0]}" in message
    assert project.materialize(DAYS[0]).success
    assert project.materialize(DAYS[1], only=[project.pointers]).success
    assert project.facts(POINTERS, DAYS[1])["pins"]["ratings"]["version"] == 2


def test_a_pin_is_the_first_version_that_covers_the_window_not_the_latest(
    project: Project,
) -> None:
    project.materialize(DAYS[0], DAYS[4], only=[project.history])
    assert project.materialize(DAYS[2], only=[project.pointers]).success
    assert project.facts(POINTERS, DAYS[2])["pins"]["ratings"]["version"] == 3


def test_the_pins_told_are_those_that_the_window_was_sealed_with(project: Project) -> None:
    """Pointers that were sealed by hand against a later snapshot keep that pin."""
    project.materialize(DAYS[0], DAYS[2], only=[project.history])
    store = HistoryStore.open(project.root / "ratings_history")
    dataset = PointerDataset.create_from(
        project.root / "next_item_pointers", SPEC, num_buckets=2, start=DAYS[0]
    )
    requests = project.source.requests(store.grid.parse(DAYS[1]))
    dataset.seal(DAYS[1], requests, {"ratings": store.snapshot()})
    assert project.materialize(DAYS[1], only=[project.pointers]).success
    facts = project.facts(POINTERS, DAYS[1])
    assert facts["reused"] is True
    assert facts["pins"]["ratings"]["version"] == 3


def test_an_empty_window_is_sealed_as_empty(project: Project) -> None:
    project.source.empty = {DAYS[1]}
    assert project.materialize(DAYS[0], DAYS[2]).success
    assert project.facts(HISTORY, DAYS[1])["dagster/row_count"] == 0
    assert project.facts(POINTERS, DAYS[1])["dagster/row_count"] == 0
    assert project.facts(HISTORY, DAYS[2])["watermark"] == "2024-01-04T00:00:00Z"


def test_requests_may_ask_for_the_pinned_histories(tmp_path: Path) -> None:
    seen: dict[str, int] = {}
    project = Project(tmp_path)

    def requests(window, histories, context):  # type: ignore[no-untyped-def]
        seen[window.key] = histories["ratings"].version
        assert context.asset_key == POINTERS

    project.pointers = pointer_asset(
        PointerSpec("next_item", ["ratings"]),
        requests=requests,
        histories={"ratings": HISTORY},
        partitions_def=DAILY,
    )
    assert project.materialize(DAYS[0], DAYS[1], checks=False).success
    assert seen == {DAYS[0]: 1, DAYS[1]: 2}


def test_a_bad_event_fails_the_run_naming_the_row(project: Project) -> None:
    good = project.source.events

    def events(window):  # type: ignore[no-untyped-def]
        table = good(window)
        users = pa.array([1, None, 1], pa.int64())
        return table.set_column(0, "user_id", users)

    project.history = history_asset(RATINGS, events=events, partitions_def=DAILY, num_buckets=2)
    message, told = failure_of(project.materialize(DAYS[0], only=[project.history]))
    assert told["error"] == "InvalidEventsError"
    assert "row 1" in message
    assert "user_id" in message


class TestPartitionsThatAreNoWindows:
    @pytest.mark.parametrize(
        ("partitions_def", "problem", "way_out"),
        [
            (
                dg.DailyPartitionsDefinition("2024-01-01", timezone="Europe/Berlin"),
                "time zone 'Europe/Berlin'",
                "drop `timezone`",
            ),
            (
                dg.DailyPartitionsDefinition("2024-01-01", hour_offset=3),
                "'0 3 \\* \\* \\*'",
                "without an offset",
            ),
            (
                dg.WeeklyPartitionsDefinition("2024-01-01", day_offset=1),
                "'0 0 \\* \\* 1'",
                "weeks from Sunday",
            ),
            (dg.MonthlyPartitionsDefinition("2024-01-01"), "'0 0 1 \\* \\*'", "whole UTC hours"),
            (
                dg.DailyPartitionsDefinition("01/01/2024", fmt="%d/%m/%Y"),
                "'01/01/2024'",
                "Drop `fmt`",
            ),
            (dg.StaticPartitionsDefinition(["a"]), "not a partition of time", "DailyPartitions"),
        ],
    )
    def test_are_refused(self, partitions_def: object, problem: str, way_out: str) -> None:
        with pytest.raises(SchemaError, match=problem) as caught:
            history_asset(RATINGS, events=lambda window: None, partitions_def=partitions_def)  # type: ignore[arg-type]
        assert way_out in str(caught.value)

    @pytest.mark.parametrize(
        "partitions_def",
        [
            dg.HourlyPartitionsDefinition("2024-01-01-00:00"),
            dg.DailyPartitionsDefinition("2024-01-01", timezone="UTC"),
            dg.WeeklyPartitionsDefinition("2024-01-07"),
        ],
    )
    def test_hours_days_and_weeks_of_utc_are_fine(self, partitions_def: object) -> None:
        history_asset(RATINGS, events=lambda window: None, partitions_def=partitions_def)  # type: ignore[arg-type]


class TestOptionsThatDoNotFit:
    def test_a_source_that_asks_for_something_unknown(self) -> None:
        with pytest.raises(SchemaError, match="'warehouse', which nobody provides"):
            history_asset(RATINGS, events=lambda window, warehouse: None, partitions_def=DAILY)

    def test_a_source_that_takes_no_window(self) -> None:
        with pytest.raises(SchemaError, match="takes no window"):
            history_asset(RATINGS, events=lambda: None, partitions_def=DAILY)

    def test_an_unknown_on_sealed(self) -> None:
        with pytest.raises(SchemaError, match="'overwrite' is unknown"):
            history_asset(
                RATINGS,
                events=lambda window: None,
                partitions_def=DAILY,
                on_sealed="overwrite",  # type: ignore[arg-type]
            )

    def test_a_feature_group_without_a_history(self) -> None:
        with pytest.raises(SchemaError, match="no history for 'clicks'"):
            pointer_asset(
                PointerSpec("p", ["ratings", "clicks"]),
                requests=lambda window: None,
                histories={"ratings": HISTORY},
                partitions_def=DAILY,
            )

    def test_a_resource_of_another_kind(self, project: Project) -> None:
        project.resources["history_io_manager"] = dg.mem_io_manager
        message, _ = failure_of(project.materialize(DAYS[0], only=[project.history]))
        assert "Define it as a VlmHistoryIOManager" in message


@pytest.mark.parametrize(
    ("partitions_def", "first", "last", "num_windows"),
    [
        (
            dg.HourlyPartitionsDefinition("2024-01-01-00:00", end_date="2024-01-01-06:00"),
            "2024-01-01-00:00",
            "2024-01-01-05:00",
            6,
        ),
        (
            dg.WeeklyPartitionsDefinition("2024-01-07", end_date="2024-01-28"),
            "2024-01-07",
            "2024-01-21",
            3,
        ),
    ],
)
def test_hours_and_weeks_are_sealed_as_days_are(
    tmp_path: Path, partitions_def: Any, first: str, last: str, num_windows: int
) -> None:
    project = Project(tmp_path)

    def events(window: Window) -> pa.Table:
        table = project.source.events(window)
        assert table is not None
        inside = pc.less(
            table["event_time"].cast(pa.int64()), window.end_us
        )  # three events a day, fewer an hour
        return table.filter(inside)

    project.history = history_asset(RATINGS, events=events, partitions_def=partitions_def)
    project.pointers = pointer_asset(
        SPEC,
        requests=lambda window: None,
        histories=[project.history],
        partitions_def=partitions_def,
    )
    assert project.materialize(first, last, checks=False).success
    windows = HistoryStore.open(tmp_path / "ratings_history").snapshot().windows
    assert len(windows) == num_windows
    for sealed in windows:
        assert project.data_version(HISTORY, sealed.window.key) == sealed.digest
