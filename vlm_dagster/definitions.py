"""The demonstration's code location: `dagster dev -w workspace.yaml`.

It is about one data set, described by the file demo.json in VLM_HOME (`./.vlm` by default), which
`vlm-dagster demo` writes; without that file, about a month of made-up events. Your own project makes
its assets with the same factories: see examples/.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq

from vlm_dagster.assets import (
    automation_sensor,
    compaction_asset,
    evaluation_asset,
    gc_asset,
    history_asset,
    history_checks,
    landing_asset,
    on_new_checkpoint,
    on_new_pointers,
    partitions_of,
    pointer_asset,
    pointer_checks,
    sealing_schedule,
    training_asset,
)
from vlm_dagster.demo.settings import DemoSettings, home_folder
from vlm_dagster.events import Landing
from vlm_dagster.io_managers import (
    VlmCheckpointIOManager,
    VlmHistoryIOManager,
    VlmPointerIOManager,
)
from vlm_dagster.pointers import PointerSpec
from vlm_dagster.schema import Trait
from vlm_dagster.windows import Window

__all__ = ["defs", "demo_definitions"]

_OWNERS = ["team:recommendations"]
_LABEL = "label"
_GROUP = "recommender"


def _nothing(stage: str) -> None:
    pass


def demo_definitions(
    settings: DemoSettings, home: Path, *, on_window: Callable[[str], None] = _nothing
) -> dg.Definitions:
    """The whole pipeline over one data set, with all its files under `home`.

    Args:
        on_window: told "sealing histories" or "building pointers" for every window begun.
    """
    landing = home / "landing"
    group = settings.group
    partitions = partitions_of(settings.cadence, settings.first_window, settings.end_window)

    raw_events = landing_asset(
        open_source=settings.open_source,
        group=group,
        directory=landing,
        cadence=settings.cadence,
        group_name=_GROUP,
        owners=_OWNERS,
    )

    def events(window: Window) -> list[str]:
        on_window("sealing histories")
        return _landed(landing).events(window)

    history = history_asset(
        group,
        events=events,
        partitions_def=partitions,
        deps=[raw_events],
        num_buckets=settings.num_buckets,
        group_name=_GROUP,
        owners=_OWNERS,
    )

    layout = compaction_asset(history, group_name=_GROUP, owners=_OWNERS)

    # Every window of pointers pins a version of its own, so without moving pins none would ever go.
    retention = gc_asset(history, delete=True, move_pins=True, group_name=_GROUP, owners=_OWNERS)

    def requests(window: Window) -> Iterator[pa.RecordBatch]:
        on_window("building pointers")
        return _requests(_landed(landing).events(window), settings)

    pointers = pointer_asset(
        _pointer_spec(settings),
        requests=requests,
        histories=[history],
        partitions_def=partitions,
        name=f"{group.name}_pointers",
        deps=[raw_events],
        num_buckets=settings.num_buckets,
        group_name=_GROUP,
        owners=_OWNERS,
    )

    ranker = training_asset(
        pointers=pointers,
        options=_training_options(settings),
        eval_share=settings.eval_share,
        num_processes=settings.num_processes,
        automation_condition=on_new_pointers(),
        group_name=_GROUP,
        owners=_OWNERS,
    )

    evaluation = evaluation_asset(
        checkpoint=ranker,
        pointers=pointers,
        automation_condition=on_new_checkpoint(ranker.key),
        group_name=_GROUP,
        owners=_OWNERS,
    )

    tables = str(home / "tables")
    return dg.Definitions(
        assets=[raw_events, history, layout, retention, pointers, ranker, evaluation],
        asset_checks=[*history_checks(history), *pointer_checks(pointers)],
        schedules=[sealing_schedule([history, pointers])],
        sensors=[automation_sensor([ranker, evaluation, layout, retention])],
        resources={
            "history_io_manager": VlmHistoryIOManager(root=tables),
            "pointer_io_manager": VlmPointerIOManager(root=tables),
            "checkpoint_io_manager": VlmCheckpointIOManager(root=str(home / "checkpoints")),
        },
        # The steps follow one another, and the heavy ones start processes of their own.
        executor=dg.in_process_executor,
    )


def _landed(folder: Path) -> Landing:
    """The landing, opened once for all windows of a run."""
    manifest = folder / "landing.json"
    return _open_landing(folder, manifest.stat().st_mtime_ns if manifest.exists() else None)


@lru_cache(maxsize=1)
def _open_landing(folder: Path, changed_ns: int | None) -> Landing:
    return Landing.open(folder)


def _pointer_spec(settings: DemoSettings) -> PointerSpec:
    """One example an event: the item it is about, and the label where there is one."""
    group = settings.group
    columns = [group.trait(settings.item_trait)]
    if settings.label is not None:
        columns.append(Trait(_LABEL, pa.int8()))
    return PointerSpec(
        "next_item",
        [group.name],
        columns,
        request="event_id",
        max_length=settings.max_length,
        user_id=group.user_id,
        request_id=group.event_id,
        duplicates=group.duplicates,
    )


def _requests(paths: list[str], settings: DemoSettings) -> Iterator[pa.RecordBatch]:
    """Every event of a window as a request: predict this one."""
    names = ["user_id", "event_id", settings.item_trait]
    label = settings.label
    for path in paths:
        wanted = names if label is None else list(dict.fromkeys([*names, label.trait]))
        for batch in pq.ParquetFile(path).iter_batches(columns=wanted):
            rows = batch.select(names)
            yield rows if label is None else rows.append_column(_LABEL, label.apply(batch))


def _training_options(settings: DemoSettings) -> dict[str, object]:
    return {
        "group": settings.group.name,
        "item_trait": settings.item_trait,
        "label_column": None if settings.label is None else _LABEL,
        **settings.training,
    }


_home = home_folder()
defs = demo_definitions(DemoSettings.load(_home), _home)
