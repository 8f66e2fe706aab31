"""Factories of Dagster assets: events to histories, requests to pointers, pointers to a model.

    raw events -> history_asset -> pointer_asset -> training_asset -> evaluation_asset
                        |                |
    history_checks, compaction_asset   pointer_checks, gc_asset      automation.py: schedule and sensor

Each factory returns one ordinary `dg.AssetsDefinition`. Importing this loads no torch.
"""

from vlm_dagster.assets.automation import (
    automation_sensor,
    on_new_checkpoint,
    on_new_pointers,
    sealing_schedule,
)
from vlm_dagster.assets.checks import history_checks, pointer_checks
from vlm_dagster.assets.compaction import compaction_asset
from vlm_dagster.assets.evaluation import EvaluateRunConfig, evaluation_asset
from vlm_dagster.assets.history import history_asset
from vlm_dagster.assets.landing import landing_asset
from vlm_dagster.assets.options import OnSealed, SealConfig
from vlm_dagster.assets.partitions import partitions_of
from vlm_dagster.assets.pointers import pointer_asset
from vlm_dagster.assets.retention import GcConfig, gc_asset
from vlm_dagster.assets.training import TrainRunConfig, training_asset

__all__ = [
    "EvaluateRunConfig",
    "GcConfig",
    "OnSealed",
    "SealConfig",
    "TrainRunConfig",
    "automation_sensor",
    "compaction_asset",
    "evaluation_asset",
    "gc_asset",
    "history_asset",
    "history_checks",
    "landing_asset",
    "on_new_checkpoint",
    "on_new_pointers",
    "partitions_of",
    "pointer_asset",
    "pointer_checks",
    "sealing_schedule",
    "training_asset",
]
