"""What happens by itself: windows are sealed when they are complete, training follows new pointers.

Both are on as soon as a Dagster daemon runs (`dagster dev` starts one).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import dagster as dg

from vlm_dagster.assets.options import AssetKeyLike
from vlm_dagster.assets.partitions import grid_of
from vlm_dagster.errors import SchemaError
from vlm_dagster.windows import Cadence

__all__ = ["automation_sensor", "on_new_checkpoint", "on_new_pointers", "sealing_schedule"]

_RANGE_START = "dagster/asset_partition_range_start"
_RANGE_END = "dagster/asset_partition_range_end"
_UNFINISHED = (
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
)


def on_new_pointers() -> dg.AutomationCondition[Any]:
    """Train when a pointer partition holds what it did not hold at the last look.

    Sealing a window again with the same content is no news. Nor are partitions that merely are
    missing, so opening the UI on finished work starts nothing. Training waits until no upstream
    partition is being made and their blocking checks have passed.
    """
    condition = dg.AutomationCondition
    return (
        condition.any_deps_match(condition.data_version_changed())
        .since_last_handled()
        .with_label("new pointers since the last training")
        & ~condition.in_progress()
        & ~condition.any_deps_in_progress()
        & condition.all_deps_blocking_checks_passed()
    ).with_label("on_new_pointers")


def on_new_checkpoint(checkpoint: AssetKeyLike) -> dg.AutomationCondition[Any]:
    """Evaluate whenever the asset `checkpoint` was made anew, in the same run if that can be."""
    condition = dg.AutomationCondition
    made = (condition.newly_updated() | condition.will_be_requested()).with_label("made anew")
    return (
        condition.any_deps_match(made)
        .allow(dg.AssetSelection.assets(dg.AssetKey.from_coercible(checkpoint)))
        .since_last_handled()
        & ~condition.in_progress()
    ).with_label("on_new_checkpoint")


def automation_sensor(
    target: dg.AssetSelection | Sequence[dg.AssetsDefinition],
    *,
    name: str = "train_on_new_pointers",
    minimum_interval_seconds: int = 30,
    default_status: dg.DefaultSensorStatus = dg.DefaultSensorStatus.RUNNING,
) -> dg.AutomationConditionSensorDefinition:
    """The sensor that evaluates the assets' automation conditions. It is on by default: the one that
    Dagster makes by itself is off."""
    selection = (
        target if isinstance(target, dg.AssetSelection) else dg.AssetSelection.assets(*target)
    )
    return dg.AutomationConditionSensorDefinition(
        name,
        target=selection,
        minimum_interval_seconds=minimum_interval_seconds,
        default_status=default_status,
        description=(
            "Starts training when a pointer partition has new content and its checks have passed, "
            "then evaluates the checkpoint."
        ),
    )


def sealing_schedule(
    assets: Sequence[dg.AssetsDefinition],
    *,
    name: str = "seal_complete_windows",
    delay_minutes: int = 15,
    max_windows: int = 31,
    default_status: dg.DefaultScheduleStatus = dg.DefaultScheduleStatus.RUNNING,
) -> dg.ScheduleDefinition:
    """A schedule that seals each window, and builds its pointers, once the window is complete.

    It also closes gaps: pointers can be built only up to the first window that is missing, so after
    an outage the oldest missing windows come first. All windows of a tick are made in one run, in
    order. Where the partitions have ended it skips.

    Args:
        assets: history and pointer assets with the same partitions.
        delay_minutes: how long after a window's end its events are awaited.
        max_windows: the most windows that one tick asks for.

    Raises:
        SchemaError: the assets have different partitions, or none.
    """
    partitions_def = _common_partitions(assets)
    keys = [key for asset in assets for key in asset.keys]
    job = dg.define_asset_job(
        f"{name}_job",
        selection=dg.AssetSelection.assets(*keys),
        description="Seal windows of histories and build their pointers, with all checks.",
    )

    @dg.schedule(
        name=name,
        cron_schedule=_cron(grid_of(partitions_def).cadence, delay_minutes),
        execution_timezone="UTC",
        job=job,
        default_status=default_status,
        description=(
            f"Seals every complete window that is not sealed yet (at most {max_windows} a tick, "
            f"oldest first) and builds its pointers."
        ),
    )
    def seal(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        now = context.scheduled_execution_time
        end = partitions_def.end
        if end is not None and now >= end:
            return dg.SkipReason(
                f"The partitions ended at {end:%Y-%m-%d %H:%M} UTC, so no new window comes. Older "
                f"ones are made by hand: select the assets, then Materialize."
            )
        complete = partitions_def.get_partition_keys(current_time=now)
        wanted = list(_oldest_missing(context.instance, keys, complete))[:max_windows]
        if not wanted:
            last = complete[-1] if complete else "none"
            return dg.SkipReason(f"Every complete window is sealed (the last one is {last}).")
        running = context.instance.get_runs(
            dg.RunsFilter(job_name=job.name, statuses=list(_UNFINISHED)), limit=1
        )
        if running:
            return dg.SkipReason(
                f"Run {running[0].run_id} of an earlier tick has not ended; the windows from "
                f"{wanted[0]} on wait for the next tick."
            )
        if len(wanted) == 1:
            return dg.RunRequest(partition_key=wanted[0])
        return dg.RunRequest(tags={_RANGE_START: wanted[0], _RANGE_END: wanted[-1]})

    return seal


def _oldest_missing(
    instance: dg.DagsterInstance, keys: Iterable[dg.AssetKey], complete: Sequence[str]
) -> Iterator[str]:
    """The windows from the oldest missing one on, in order."""
    done: set[str] | None = None
    for key in keys:
        made = instance.get_materialized_partitions(key)
        done = made if done is None else done & made
    gap = False
    for window in complete:
        gap = gap or window not in (done or ())
        if gap:
            yield window


def _cron(cadence: Cadence, delay_minutes: int) -> str:
    hour, minute = divmod(delay_minutes, 60)
    if not 0 <= delay_minutes < (60 if cadence == "hourly" else 24 * 60):
        raise SchemaError(
            f"delay_minutes={delay_minutes} is out of range",
            "Use 0 to 59 for hourly windows, and less than 24 hours for others.",
        )
    times = {"hourly": "* * * *", "daily": f"{hour} * * *", "weekly": f"{hour} * * 0"}
    return f"{minute} {times[cadence]}"


def _common_partitions(
    assets: Sequence[dg.AssetsDefinition],
) -> dg.TimeWindowPartitionsDefinition:
    found = [asset.partitions_def for asset in assets]
    first = found[0] if found else None
    if not isinstance(first, dg.TimeWindowPartitionsDefinition):
        raise SchemaError(
            "the schedule got no partitioned assets", "Pass history and pointer assets."
        )
    if any(other != first for other in found):
        raise SchemaError(
            "the assets of one schedule have different partitions", "Make a schedule for each."
        )
    return first
