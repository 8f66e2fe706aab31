"""A training run from its config to its evaluation: count items, train, save, evaluate, report."""

from __future__ import annotations

import platform
import random
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlm_dagster.models.hstu import HSTU
from vlm_dagster.models.inputs import ModelInputs
from vlm_dagster.training.checkpoint import (
    load_checkpoint,
    save_checkpoint,
    write_json,
)
from vlm_dagster.training.config import TrainingConfig
from vlm_dagster.training.data import open_loader, train_vocabulary
from vlm_dagster.training.evaluation import EVALUATION, evaluate_checkpoint
from vlm_dagster.training.features import to_model_inputs
from vlm_dagster.training.interrupt import StopRequest
from vlm_dagster.training.loop import TrainingSummary, train
from vlm_dagster.training.referring import referring
from vlm_dagster.training.reporting import Reporter
from vlm_dagster.training.vocabulary import Vocabulary
from vlm_dagster.training.world import World

__all__ = ["run"]


class _StopEvaluationError(Exception):
    """Raised to leave an evaluation."""


def _environment(world: World) -> dict[str, object]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vlm_dagster": version("vlm-dagster"),
        "device": world.device.type,
        "num_ranks": world.size,
        "num_threads": torch.get_num_threads(),
    }


def _seed(seed: int, rank: int) -> None:
    # Ranks share their initial weights through DDP, but must not drop the same units.
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def _train(
    config: TrainingConfig, world: World, stop: StopRequest, reporter: Reporter
) -> tuple[TrainingSummary, HSTU, Vocabulary, dict[str, Any]]:
    """Also returns the loader's stall report."""
    reporter.say("counting the items of the training windows")
    vocabulary = train_vocabulary(config)
    reporter.say(
        f"{vocabulary.size - 1:,} items from {int(vocabulary.counts.sum()):,} events; training on "
        f"{world.size} x {world.device.type}"
    )
    loader = open_loader(config.train_pointers, config, world, shuffle=True)
    if loader.num_dropped:
        reporter.say(f"left out {loader.num_dropped:,} examples: events they point at are gone")

    def batches_of(epoch: int) -> Iterator[ModelInputs]:
        loader.set_epoch(epoch)
        for batch in loader:
            yield to_model_inputs(batch, vocabulary, config)

    _seed(config.seed, world.rank)
    model = HSTU(config.model, vocabulary.size).to(world.device)
    summary = train(model, batches_of, config, world=world, stop=stop, on_step=reporter.step)
    return summary, model, vocabulary, loader.report()


def run(config: TrainingConfig, world: World, stop: StopRequest, reporter: Reporter) -> int:
    """Train, save, evaluate. Every rank calls it. Returns the signal that stopped it, or 0.

    Raises:
        VlmError: see the parts; nothing half-written is left behind.
    """
    with referring(config) if world.rank == 0 else nullcontext():
        return _run(config, world, stop, reporter)


def _run(config: TrainingConfig, world: World, stop: StopRequest, reporter: Reporter) -> int:
    folder = Path(config.checkpoint_dir)
    summary, model, vocabulary, loading = _train(config, world, stop, reporter)
    if summary.num_steps and world.rank == 0:
        (folder / EVALUATION).unlink(missing_ok=True)  # it is about the checkpoint before
        manifest = save_checkpoint(
            folder,
            model,
            vocabulary,
            config,
            metrics=summary.to_json(),
            environment=_environment(world),
        )
        reporter.trained(summary, manifest, folder)
        reporter.loaded(loading)
    world.barrier()  # the others read what the first has written
    if summary.stopped_by == "interrupt":
        saved = (
            f"the checkpoint in {folder} is complete" if summary.num_steps else "nothing was saved"
        )
        reporter.say(f"stopped by a signal after {summary.num_steps:,} steps; {saved}")
        return stop.signal or signal.SIGINT
    if config.eval_pointers is not None:

        def on_batch(num_examples: int) -> None:
            if stop.requested:
                raise _StopEvaluationError
            reporter.evaluating(num_examples)

        try:
            result = evaluate_checkpoint(load_checkpoint(folder), config, world, on_batch=on_batch)
        except _StopEvaluationError:
            reporter.say(f"evaluation stopped by a signal; the checkpoint in {folder} is complete")
            return stop.signal or signal.SIGINT
        if world.rank == 0:
            write_json(folder / EVALUATION, result)
            reporter.evaluated(result, folder / EVALUATION)
    return 0
