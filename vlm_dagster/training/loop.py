"""The training loop: steps over batches until an epoch, step, time or stop limit is met.

Ranks may hold unequal numbers of batches. Before each step all ranks agree whether any has one
left and whether to stop; a rank without one takes part with an empty batch. Losses are sums,
divided by counts over *all* ranks, so a step's gradient is that of the ranks' batches taken as
one: nothing is dropped, and nothing is weighted by which rank it fell to.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vlm_dagster.errors import TrainingError
from vlm_dagster.models.hstu import HSTU
from vlm_dagster.models.inputs import ModelInputs
from vlm_dagster.training.config import TrainingConfig
from vlm_dagster.training.interrupt import StopRequest
from vlm_dagster.training.world import World

__all__ = ["StepReport", "TrainingSummary", "train"]

_RECENT = 50  # steps over which the final losses are averaged
_GO, _TIME_IS_UP, _INTERRUPTED = 0, 1, 2


@dataclass(frozen=True)
class StepReport:
    """One step, over all ranks.

    Attributes:
        step, epoch: counted from 1 and from 0.
        num_examples: in this step.
        next_item_loss: mean, nats.
        label_loss: mean, nats; None without labels.
        seconds: since training began.
    """

    step: int
    epoch: int
    num_examples: int
    next_item_loss: float
    label_loss: float | None
    seconds: float


@dataclass(frozen=True)
class TrainingSummary:
    """A finished or stopped training.

    Attributes:
        num_steps, num_examples: over all ranks.
        num_epochs: completed ones.
        stopped_by: "epochs", "max_steps", "max_seconds" or "interrupt".
        next_item_loss, label_loss: means over the last 50 steps, nats; None where there is none.
        seconds: of training, reading included.
        data_wait_share: share of this rank's time spent waiting for the loader.
    """

    num_steps: int
    num_epochs: int
    num_examples: int
    stopped_by: str
    next_item_loss: float | None
    label_loss: float | None
    seconds: float
    data_wait_share: float

    def to_json(self) -> dict[str, Any]:
        rate = self.num_examples / self.seconds if self.seconds else 0.0
        return {**asdict(self), "examples_per_second": rate}


class _Clock:
    """Time since training began, and how much of it went into waiting for batches."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self.waited = 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def next_batch(self, batches: Iterator[ModelInputs]) -> ModelInputs | None:
        asked = time.monotonic()
        batch = next(batches, None)
        self.waited += time.monotonic() - asked
        return batch


class _Stepper:
    """Model, optimizer and learning rate; takes one step at a time."""

    def __init__(self, model: HSTU, config: TrainingConfig, world: World) -> None:
        self.config, self.world, self.num_steps = config, world, 0
        self.parameters = list(model.parameters())
        self.model: nn.Module = model if world.size == 1 else DistributedDataParallel(model)
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=config.weight_decay,
        )

    def __call__(self, inputs: ModelInputs, where: str) -> tuple[int, float, float | None]:
        """Take a step. Examples, mean next-item loss and mean label loss over all ranks."""
        self.num_steps += 1
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * min(
                1.0, self.num_steps / (config.warmup_steps + 1)
            )
        losses = self.model(inputs)
        totals = self.world.all_sum(
            torch.tensor(
                [
                    inputs.num_examples,
                    losses.num_targets,
                    losses.num_labels,
                    losses.next_item.item(),
                    losses.label.item(),
                ],
                dtype=torch.float64,
            )
        )
        num_examples, num_targets, num_labels, next_item_sum, label_sum = totals.tolist()
        next_item = next_item_sum / max(1.0, num_targets)
        label = label_sum / num_labels if num_labels else None
        if not bool(torch.isfinite(totals).all()):
            raise TrainingError(
                f"the loss is not finite (next item {next_item}, label {label}) at {where}",
                f"Lower learning_rate (now {config.learning_rate}) or max_grad_norm (now "
                f"{config.max_grad_norm}), or look at that batch's data. Nothing was saved.",
                step=self.num_steps,
            )
        # DDP averages gradients over ranks; times their number, that is the sum.
        loss: Tensor = losses.next_item / max(1.0, num_targets)
        if num_labels:
            loss = loss + losses.label * (config.label_weight / num_labels)
        self.optimizer.zero_grad()
        (loss * self.world.size).backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise TrainingError(
                f"the gradient is not finite (norm {float(norm)}) at {where}",
                f"Lower learning_rate (now {config.learning_rate}). Nothing was saved.",
                step=self.num_steps,
            )
        self.optimizer.step()
        return int(num_examples), next_item, label


def train(
    model: HSTU,
    epoch_batches: Callable[[int], Iterable[ModelInputs]],
    config: TrainingConfig,
    *,
    world: World | None = None,
    stop: StopRequest | None = None,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> TrainingSummary:
    """Train `model` in place.

    Args:
        model: on the world's device.
        epoch_batches: epoch, from 0, to this rank's batches, on any device.
        config: limits and hyper-parameters.
        world: the ranks; None is this process alone.
        stop: asked before each step; when set on any rank, all ranks stop.
        on_step: called after each step on every rank.

    Raises:
        TrainingError: a loss or gradient is not finite (names step and batch), or there is
            nothing to train on.
    """
    world, stop = world or World(), stop or StopRequest()
    stepper, clock = _Stepper(model.train(), config, world), _Clock()
    no_examples = ModelInputs.empty(
        (trait.name for trait in config.model.traits), labels=config.model.label_head
    ).to(world.device)
    recent: deque[tuple[float, float | None]] = deque(maxlen=_RECENT)
    num_examples = num_epochs = 0
    stopped_by = "epochs"

    for epoch in range(config.epochs):
        batches = iter(epoch_batches(epoch))
        index = 0
        while True:
            if config.max_steps is not None and stepper.num_steps >= config.max_steps:
                stopped_by = "max_steps"
                break
            wanted = _GO
            if stop.requested:
                wanted = _INTERRUPTED
            elif config.max_seconds is not None and clock.seconds >= config.max_seconds:
                wanted = _TIME_IS_UP
            agreed = world.all_max(wanted)
            if agreed != _GO:
                stopped_by = "interrupt" if agreed == _INTERRUPTED else "max_seconds"
                break
            batch = clock.next_batch(batches)
            if not world.all_max(int(batch is not None)):
                num_epochs += 1
                break
            inputs = no_examples if batch is None else batch.to(world.device)
            where = f"epoch {epoch}, batch {index} of rank {world.rank} ({inputs.num_examples} examples)"
            count, next_item, label = stepper(inputs, where)
            index += 1
            num_examples += count
            recent.append((next_item, label))
            on_step(StepReport(stepper.num_steps, epoch, count, next_item, label, clock.seconds))
        if stopped_by != "epochs":
            break

    if not stepper.num_steps and stopped_by == "epochs":
        raise TrainingError(
            "the training pointers hold no example", "Name windows that have requests."
        )
    labels = [label for _, label in recent if label is not None]
    return TrainingSummary(
        num_steps=stepper.num_steps,
        num_epochs=num_epochs,
        num_examples=num_examples,
        stopped_by=stopped_by,
        next_item_loss=sum(loss for loss, _ in recent) / len(recent) if recent else None,
        label_loss=sum(labels) / len(labels) if labels else None,
        seconds=clock.seconds,
        data_wait_share=clock.waited / clock.seconds,
    )
