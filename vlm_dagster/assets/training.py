"""The training asset: pinned pointers in, a checkpoint that names them out."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from vlm_dagster.assets.figures import inputs_table, loss_figure, training_table
from vlm_dagster.assets.metadata import pins_value
from vlm_dagster.assets.options import declared_version
from vlm_dagster.assets.processes import run_module, steps_of, storage_environment, torchrun_command
from vlm_dagster.errors import SchemaError, WindowError
from vlm_dagster.io_managers.checkpoints import VlmCheckpointIOManager
from vlm_dagster.io_managers.failures import told_to_dagster
from vlm_dagster.io_managers.handles import CheckpointRef
from vlm_dagster.io_managers.pointers import VlmPointerIOManager
from vlm_dagster.io_managers.tables import io_manager_of
from vlm_dagster.pointers import PointerRef, PointerSnapshot
from vlm_dagster.training.checkpoint import read_manifest, write_json
from vlm_dagster.training.config import TrainingConfig

__all__ = ["TrainRunConfig", "training_asset"]

_MODULE = "vlm_dagster.training.run"


class TrainRunConfig(dg.Config):
    """Run configuration of a training asset (the launchpad shows it). Everything is optional."""

    first_window: str | None = Field(
        default=None,
        description="Train on windows from this partition key on. Empty: from the first.",
    )
    last_window: str | None = Field(
        default=None,
        description=(
            "Train on windows up to and with this partition key. Empty: up to the newest, less "
            "those held out for evaluation."
        ),
    )
    eval_share: float | None = Field(
        default=None,
        description=(
            "Hold out the newest windows that have at least this share of the examples (0 to 1). "
            "Empty: as the asset declares. Without effect where `last_window` is given."
        ),
    )
    num_processes: int | None = Field(
        default=None,
        description="Ranks that torchrun starts on this machine. Empty: as the asset declares.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description=(
            "Options of `vlm_dagster.training.TrainingConfig` for this run, over those that the "
            "asset declares, e.g. {epochs: 3, learning_rate: 0.001}."
        ),
    )


def training_asset(
    *,
    pointers: dg.AssetsDefinition,
    options: Mapping[str, Any] | None = None,
    name: str = "ranker",
    key_prefix: str | Sequence[str] | None = None,
    eval_share: float = 0.1,
    num_processes: int = 1,
    deps: Iterable[Any] = (),
    io_manager_key: str = "checkpoint_io_manager",
    automation_condition: dg.AutomationCondition[Any] | None = None,
    group_name: str | None = None,
    code_version: str | None = None,
    description: str | None = None,
    kinds: Iterable[str] = ("pytorch",),
    owners: Sequence[str] = (),
    tags: Mapping[str, str] | None = None,
) -> dg.AssetsDefinition:
    """An asset that trains a sequential recommender on pointer windows, in processes of its own.

    It depends on all partitions of the pointers, takes those that are sealed when it starts, holds
    the newest out for evaluation, and starts `torchrun` through Dagster Pipes. The materialization
    tells metrics, the loss over time, and every pin: of the pointers, and of the histories that
    these point into. The data version is the digest of the weights.

    Args:
        pointers: what `pointer_asset` made.
        options: options of `TrainingConfig` other than its pointers and folder, as JSON values;
            e.g. {"group": "ratings", "label_column": "label", "epochs": 2, "model": {...}}.
        eval_share: the newest windows with at least this share of the examples are not trained on.
        num_processes: ranks on this machine; one a GPU, or one on a CPU.
        io_manager_key: a `VlmCheckpointIOManager` among the resources.
        code_version: by default it changes when `options` or `eval_share` do.

    Raises:
        SchemaError: an option is unknown or out of range.
    """
    declared = dict(options or {})
    _check_options(declared, eval_share, num_processes)
    pointer_io_manager_key = str(pointers.metadata_by_key[pointers.key]["vlm/io_manager_key"])

    @dg.asset(
        name=name,
        key_prefix=key_prefix,
        ins={"pointers": dg.AssetIn(key=pointers.key, partition_mapping=dg.AllPartitionMapping())},
        deps=list(deps),
        io_manager_key=io_manager_key,
        required_resource_keys={io_manager_key, pointer_io_manager_key},
        automation_condition=automation_condition,
        group_name=group_name,
        code_version=code_version or declared_version(declared, eval_share),
        description=description or _DESCRIPTION,
        kinds=set(kinds),
        owners=list(owners),
        tags=tags,
        metadata={"vlm/kind": "checkpoint", "vlm/io_manager_key": io_manager_key},
    )
    def trained_model(
        context: dg.AssetExecutionContext, config: TrainRunConfig, pointers: PointerRef
    ) -> dg.MaterializeResult[CheckpointRef]:
        with told_to_dagster():
            manager = io_manager_of(context, pointer_io_manager_key, VlmPointerIOManager)
            checkpoints = getattr(context.resources, io_manager_key)
            if not isinstance(checkpoints, VlmCheckpointIOManager):
                raise SchemaError(
                    f"resource {io_manager_key!r} is a {type(checkpoints).__name__}",
                    "Define it as a VlmCheckpointIOManager.",
                )
            snapshot = pointers.open(manager.options)
            train = _train_windows(snapshot, config, eval_share)
            chosen = manager.part_of(pointers, train)
            folder = checkpoints.folder(context.asset_key, context.run.run_id)
            training = TrainingConfig.from_json(
                {
                    **declared,
                    **config.options,
                    "train_pointers": chosen.to_json(),
                    "checkpoint_dir": str(folder),
                }
            )
            path = _written(folder, training)
        num_ranks = config.num_processes or num_processes
        invocation = run_module(
            context,
            torchrun_command(_MODULE, num_ranks, ["--config", str(path)]),
            what="training",
            config_path=path,
            environment=storage_environment(manager.options),
        )
        with told_to_dagster():
            manifest = read_manifest(folder)
            reported = invocation.get_materialize_result().metadata or {}
            ref = CheckpointRef(str(folder), manifest.digest, manifest.weights_digest)
        curve = loss_figure(steps_of(invocation.get_custom_messages()))
        return dg.MaterializeResult(
            value=ref,
            data_version=dg.DataVersion(manifest.weights_digest),
            metadata={
                "summary": dg.MetadataValue.md(training_table(manifest.metrics, train, snapshot)),
                **({"loss": dg.MetadataValue.md(curve)} if curve else {}),
                **reported,
                "inputs": dg.MetadataValue.md(inputs_table(chosen)),
                "pins": pins_value({"pointers": chosen.to_json()}),
                "training_config": dg.MetadataValue.json(_options_of(training)),
                "training_config_digest": training.digest,
            },
        )

    return trained_model


_DESCRIPTION = """A sequential recommender (HSTU) trained on pointer windows.

It runs as a process of its own (`torchrun`), which rebuilds every example's history from the pinned \
snapshots, and writes a checkpoint that names these pins. The newest windows are held out for \
evaluation. The digest of the weights is the data version.

Options for one run (windows, epochs, learning rate, ...) go into the launchpad.
"""


def _check_options(options: Mapping[str, Any], eval_share: float, num_processes: int) -> None:
    ours = [key for key in ("train_pointers", "eval_pointers", "checkpoint_dir") if key in options]
    if ours:
        raise SchemaError(
            f"options hold {ours[0]!r}", "Leave it out: the asset sets it for every run."
        )
    TrainingConfig.from_json({**options, "train_pointers": {}, "checkpoint_dir": "unknown yet"})
    if not 0 <= eval_share < 1:
        raise SchemaError(f"eval_share={eval_share!r} is not a share", "Use 0 <= eval_share < 1.")
    if num_processes < 1:
        raise SchemaError(f"num_processes={num_processes!r}", "Use 1 or more.")


def _train_windows(
    snapshot: PointerSnapshot, config: TrainRunConfig, eval_share: float
) -> list[str]:
    """The windows to train on; those after them are left for evaluation."""
    counts = [(sealed.window.key, sealed.num_rows) for sealed in snapshot.windows]
    chosen = [
        (key, num)
        for key, num in counts
        if (config.first_window is None or key >= config.first_window)
        and (config.last_window is None or key <= config.last_window)
    ]
    if config.last_window is None:
        share = eval_share if config.eval_share is None else config.eval_share
        chosen = chosen[: len(chosen) - num_held_out([num for _, num in chosen], share)]
    if not sum(num for _, num in chosen):
        raise WindowError(
            config.first_window or (counts[0][0] if counts else None),
            f"no examples to train on among {len(counts)} sealed windows of {snapshot.uri}",
            "Materialize more pointer partitions, or choose other windows.",
        )
    return [key for key, _ in chosen]


def num_held_out(counts: Sequence[int], share: float) -> int:
    """How many of the newest windows hold at least `share` of all examples.

    Args:
        counts: examples of each window, oldest first.

    Returns:
        0 for a share of 0; otherwise the fewest that do and have examples, but never so many that
        no example is left before them (then 0).
    """
    wanted = share * sum(counts)
    if wanted <= 0:
        return 0
    held = 0
    for number, count in enumerate(reversed(counts), start=1):
        held += count
        if held >= wanted:
            return number if sum(counts) > held else 0
    return 0


def _options_of(config: TrainingConfig) -> dict[str, Any]:
    """A config without its pins, which have an entry of their own."""
    return {
        k: v for k, v in config.to_json().items() if k not in ("train_pointers", "eval_pointers")
    }


def _written(folder: Path, config: TrainingConfig) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    write_json(path, config.to_json())
    return path
