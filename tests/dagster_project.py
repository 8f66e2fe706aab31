"""A small Dagster project, as a user would write it: two users' events, three a day."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa

from vlm_dagster.assets import history_asset, history_checks, pointer_asset, pointer_checks
from vlm_dagster.io_managers import VlmHistoryIOManager, VlmPointerIOManager
from vlm_dagster.pointers import PointerSpec
from vlm_dagster.schema import FeatureGroup, Trait
from vlm_dagster.windows import Window

DAYS = ["2024-01-01", "2024-01-02", "2024-01-03", "2024-01-04", "2024-01-05"]
DAILY = dg.DailyPartitionsDefinition("2024-01-01", end_date="2024-01-06")
RATINGS = FeatureGroup("ratings", [Trait("item_id", pa.int64()), Trait("stars", pa.float32())])
HISTORY = dg.AssetKey("ratings_history")
POINTERS = dg.AssetKey("next_item_pointers")
SPEC = PointerSpec(
    "next_item", ["ratings"], [Trait("item_id", pa.int64()), Trait("label", pa.int8())]
)

_RANGE = ("dagster/asset_partition_range_start", "dagster/asset_partition_range_end")


class Source:
    """What the platform would say about a window; a test may change its mind."""

    def __init__(self) -> None:
        self.shift = 0
        self.num_reads = 0
        self.empty: set[str] = set()
        self.without: set[int] = set()

    def events(self, window: Window) -> pa.Table | None:
        self.num_reads += 1
        if window.key in self.empty:
            return None
        times = [window.start_us + hour * 3_600_000_000 for hour in (1, 5, 23)]
        users = [1, 2, 1]
        found = pa.table(
            {
                "user_id": pa.array(users, pa.int64()),
                "event_id": pa.array([t // 1_000_000 for t in times], pa.int64()),
                "event_time": pa.array(times, pa.timestamp("us", "UTC")),
                "item_id": pa.array([10 + self.shift, 11, 12], pa.int64()),
                "stars": pa.array([5.0, 1.0, 3.0], pa.float32()),
            }
        )
        return found.filter(pa.array([user not in self.without for user in users]))

    def requests(self, window: Window) -> pa.Table | None:
        events = self.events(window)
        if events is None:
            return None
        labels = pa.array([int(s >= 3) for s in events["stars"].to_pylist()], pa.int8())
        return events.select(["user_id", "event_id", "item_id"]).append_column("label", labels)


class Project:
    """The assets over a source, with tables under `root`, and an instance that remembers runs."""

    def __init__(self, root: Path, **history_options: Any) -> None:
        self.root = root
        self.source = Source()
        self.history = history_asset(
            RATINGS,
            events=self.source.events,
            partitions_def=DAILY,
            num_buckets=2,
            **history_options,
        )
        self.pointers = pointer_asset(
            SPEC,
            requests=self.source.requests,
            histories=[self.history],
            partitions_def=DAILY,
            num_buckets=2,
        )
        self.checks = [*history_checks(self.history), *pointer_checks(self.pointers)]
        self.resources: dict[str, Any] = {
            "history_io_manager": VlmHistoryIOManager(root=str(root)),
            "pointer_io_manager": VlmPointerIOManager(root=str(root)),
        }
        root.mkdir(parents=True, exist_ok=True)
        self.instance = dg.DagsterInstance.ephemeral(tempdir=str(root))

    @property
    def definitions(self) -> dg.Definitions:
        return dg.Definitions(
            assets=[self.history, self.pointers],
            asset_checks=self.checks,
            resources=self.resources,
        )

    def materialize(
        self,
        first: str,
        last: str | None = None,
        *,
        only: Sequence[dg.AssetsDefinition] | None = None,
        checks: bool = True,
        on_sealed: str | None = None,
        correct_because: str | None = None,
    ) -> dg.ExecuteInProcessResult:
        """One run over a partition, or over all from `first` to `last`."""
        span = {} if last is None else {"tags": dict(zip(_RANGE, (first, last), strict=True))}
        chosen = [self.history, self.pointers] if only is None else list(only)
        config = {"config": {"on_sealed": on_sealed}}
        ops = {a.key.to_python_identifier(): config for a in chosen} if on_sealed else {}
        if correct_because is not None:
            correcting = {"correct_because": correct_because}
            ops[self.history.key.to_python_identifier()] = {"config": correcting}
        return dg.materialize(
            [self.history, self.pointers, *(self.checks if checks else [])],
            selection=None if only is None else dg.AssetSelection.assets(*(a.key for a in only)),
            partition_key=first if last is None else None,
            instance=self.instance,
            resources=self.resources,
            raise_on_error=False,
            run_config={"ops": ops} if ops else None,
            **span,
        )

    def latest(self, key: dg.AssetKey, partition: str) -> dg.AssetMaterialization:
        """What Dagster goes by for a partition."""
        wanted = dg.AssetRecordsFilter(asset_key=key, asset_partitions=[partition])
        record = self.instance.fetch_materializations(wanted, limit=1).records[0]
        assert record.asset_materialization is not None
        return record.asset_materialization

    def data_version(self, key: dg.AssetKey, partition: str) -> str:
        return (self.latest(key, partition).tags or {})["dagster/data_version"]

    def facts(self, key: dg.AssetKey, partition: str) -> dict[str, Any]:
        return {name: v.value for name, v in self.latest(key, partition).metadata.items()}


def failure_of(result: dg.ExecuteInProcessResult) -> tuple[str, dict[str, Any]]:
    """The message and the metadata of the one step that failed."""
    (event,) = [e for e in result.all_events if e.is_step_failure]
    data = event.step_failure_data
    told = data.user_failure_data
    assert told is not None, data.error_display_string
    return told.description or "", {name: v.value for name, v in told.metadata.items()}
