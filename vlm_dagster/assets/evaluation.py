"""The evaluation asset: a checkpoint against the windows that came after those it was trained on."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from vlm_dagster.assets.figures import evaluation_table, inputs_table
from vlm_dagster.assets.metadata import pins_value
from vlm_dagster.assets.options import declared_version
from vlm_dagster.assets.processes import module_command, run_module, storage_environment
from vlm_dagster.errors import CheckpointError, SchemaError, WindowError
from vlm_dagster.io_managers.failures import told_to_dagster
from vlm_dagster.io_managers.handles import CheckpointRef
from vlm_dagster.io_managers.pointers import VlmPointerIOManager
from vlm_dagster.io_managers.tables import io_manager_of
from vlm_dagster.pointers import PointerRef
from vlm_dagster.training.checkpoint import Manifest, read_manifest, write_json
from vlm_dagster.training.config import TrainingConfig

__all__ = ["EvaluateRunConfig", "evaluation_asset"]

_MODULE = "vlm_dagster.training.evaluate"
_RESULT = "evaluation.json"


class EvaluateRunConfig(dg.Config):
    """Run configuration of an evaluation asset. Everything is optional."""

    first_window: str | None = Field(
        default=None,
        description=(
            "Evaluate on windows from this partition key on. Empty: from the first one after the "
            "training windows."
        ),
    )
    last_window: str | None = Field(
        default=None, description="Up to and with this partition key. Empty: up to the newest."
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of `TrainingConfig` that begin with `eval_`, over those declared.",
    )


def evaluation_asset(
    *,
    checkpoint: dg.AssetsDefinition,
    pointers: dg.AssetsDefinition,
    options: Mapping[str, Any] | None = None,
    name: str | None = None,
    key_prefix: str | Sequence[str] | None = None,
    deps: Iterable[Any] = (),
    automation_condition: dg.AutomationCondition[Any] | None = None,
    group_name: str | None = None,
    code_version: str | None = None,
    description: str | None = None,
    kinds: Iterable[str] = ("pytorch",),
    owners: Sequence[str] = (),
    tags: Mapping[str, str] | None = None,
) -> dg.AssetsDefinition:
    """An asset that evaluates a checkpoint in a process of its own.

    Next items are ranked among all items that training knew (HR@K, NDCG@K, MRR) beside a popularity
    baseline; normalized entropy where there is a binary label. Windows that training saw are refused.

    Args:
        checkpoint: what `training_asset` made.
        pointers: what `pointer_asset` made; usually what the checkpoint was trained on.
        options: those of `TrainingConfig` that begin with `eval_`.

    Raises:
        SchemaError: an option is unknown.
    """
    declared = dict(options or {})
    _check_options(declared)
    pointer_io_manager_key = str(pointers.metadata_by_key[pointers.key]["vlm/io_manager_key"])

    @dg.asset(
        name=name or f"{checkpoint.key.path[-1]}_evaluation",
        key_prefix=key_prefix,
        ins={
            "checkpoint": dg.AssetIn(key=checkpoint.key),
            "pointers": dg.AssetIn(key=pointers.key, partition_mapping=dg.AllPartitionMapping()),
        },
        deps=list(deps),
        required_resource_keys={pointer_io_manager_key},
        automation_condition=automation_condition,
        group_name=group_name,
        code_version=code_version or declared_version(declared),
        description=description or _DESCRIPTION,
        kinds=set(kinds),
        owners=list(owners),
        tags=tags,
        metadata={"vlm/kind": "evaluation"},
    )
    def evaluated_model(
        context: dg.AssetExecutionContext,
        config: EvaluateRunConfig,
        checkpoint: CheckpointRef,
        pointers: PointerRef,
    ) -> dg.MaterializeResult[None]:
        with told_to_dagster():
            _check_options(config.options)
            manager = io_manager_of(context, pointer_io_manager_key, VlmPointerIOManager)
            manifest = read_manifest(checkpoint.folder)
            windows = _eval_windows(pointers, manifest, config)
            chosen = manager.part_of(pointers, windows)
            evaluation = TrainingConfig.from_json(
                {
                    **manifest.training_config,
                    **declared,
                    **config.options,
                    "eval_pointers": chosen.to_json(),
                }
            )
            path = Path(checkpoint.folder) / "evaluation_config.json"
            write_json(path, evaluation.to_json())
        invocation = run_module(
            context,
            module_command(_MODULE, ["--checkpoint", checkpoint.folder, "--config", str(path)]),
            what="evaluation",
            config_path=path,
            environment=storage_environment(manager.options),
        )
        with told_to_dagster():
            result = _result(Path(checkpoint.folder) / _RESULT, checkpoint)
        reported = invocation.get_materialize_result().metadata or {}
        return dg.MaterializeResult(
            data_version=dg.DataVersion(_digest(result)),
            metadata={
                "summary": dg.MetadataValue.md(evaluation_table(result)),
                **reported,
                "windows": f"{windows[0]} to {windows[-1]} ({len(windows)})",
                "checkpoint": dg.MetadataValue.json(checkpoint.to_json()),
                "inputs": dg.MetadataValue.md(inputs_table(chosen)),
                "pins": pins_value(
                    {"checkpoint": checkpoint.to_json(), "pointers": chosen.to_json()}
                ),
            },
        )

    return evaluated_model


_DESCRIPTION = """How good the checkpoint is on windows that came after those it was trained on.

Next items are ranked among **all** items (HR@10, NDCG@10) beside a popularity baseline; where \
examples carry a binary label, normalized entropy (NE) says how much better than the base rate the \
predictions are (below 1 is better).
"""


def _check_options(options: Mapping[str, Any]) -> None:
    others = [key for key in options if not key.startswith("eval_") or key == "eval_pointers"]
    if others:
        raise SchemaError(
            f"evaluation options hold {others[0]!r}",
            "Only those that begin with eval_ may differ from the training run.",
        )
    TrainingConfig.from_json({**options, "train_pointers": {}, "checkpoint_dir": "unknown yet"})


def _eval_windows(pointers: PointerRef, manifest: Manifest, config: EvaluateRunConfig) -> list[str]:
    """The windows asked for; by default all after the last one trained on."""
    trained = manifest.pins["train"]
    last = trained["windows"][-1]
    windows = [
        key
        for key in pointers.windows
        if (key > last if config.first_window is None else key >= config.first_window)
        and (config.last_window is None or key <= config.last_window)
    ]
    same_table = trained["table_id"] == pointers.table_id
    seen = sorted(set(windows) & set(trained["windows"])) if same_table else []
    if seen:
        raise WindowError(
            seen[0], "the checkpoint was trained on it", f"Evaluate on windows after {last}."
        )
    if not windows:
        raise WindowError(
            config.first_window or last,
            f"there is no window to evaluate on: training went up to {last}, the pointers to "
            f"{pointers.windows[-1]}",
            "Train with a larger eval_share (or an earlier last_window), or materialize newer "
            "pointer partitions.",
        )
    return windows


def _result(path: Path, checkpoint: CheckpointRef) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            str(path), f"the evaluation cannot be read ({error})", "Evaluate again."
        ) from None
    if result.get("checkpoint_digest") != checkpoint.digest:
        raise CheckpointError(
            str(path),
            f"it is the evaluation of checkpoint {result.get('checkpoint_digest')}, not of "
            f"{checkpoint.digest}",
            "Another run evaluated or trained into the same folder meanwhile: evaluate again.",
        )
    return result


def _digest(result: Mapping[str, Any]) -> str:
    """Equal results have equal digests, however long they took."""
    lasting = {name: value for name, value in result.items() if name != "seconds"}
    lasting.pop("checkpoint_digest", None)  # covers timings of the training
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()
