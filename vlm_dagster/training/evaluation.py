"""Evaluation of a checkpoint on the eval windows: next item over the full item set, and NE.

A target that training never saw cannot be ranked and counts as a miss; how many there were is
reported. The popularity baseline ranks items by how often they occurred in training, under the
same rules, so that the model's figures can be judged.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlm_dagster.errors import TrainingError
from vlm_dagster.models.hstu import HSTU
from vlm_dagster.models.inputs import ModelInputs
from vlm_dagster.training.checkpoint import Checkpoint
from vlm_dagster.training.config import TrainingConfig
from vlm_dagster.training.features import to_model_inputs
from vlm_dagster.training.metrics import NormalizedEntropy, RankingMetrics, target_ranks
from vlm_dagster.training.vocabulary import Vocabulary
from vlm_dagster.training.world import World

if TYPE_CHECKING:
    from vlm_dagster.loaders import Batch

__all__ = ["EVALUATION", "evaluate", "evaluate_checkpoint"]

FORMAT_VERSION = 1
EVALUATION = "evaluation.json"
_SCORES_AT_ONCE = 1 << 25  # bounds memory: rows are scored in slices of so many / V


@dataclass(frozen=True)
class _Scored:
    """What scoring yields for each of B examples, on the CPU."""

    model_ranks: Tensor
    popularity_ranks: Tensor
    known: Tensor
    logits: Tensor | None
    labels: Tensor | None


def _seen_items(inputs: ModelInputs, num_items: int) -> Tensor:
    """bool [B, V]: the items of each history; the unknown item never counts."""
    lengths = inputs.lengths
    seen = torch.zeros(len(lengths), num_items, dtype=torch.bool, device=inputs.items.device)
    rows = torch.arange(len(lengths), device=seen.device).repeat_interleave(lengths)
    seen[rows, inputs.items] = True
    seen[:, 0] = False
    return seen


def _score(model: HSTU, inputs: ModelInputs, popularity: Tensor, *, exclude_seen: bool) -> _Scored:
    assert inputs.targets is not None
    states = model.user_states(inputs)
    seen = _seen_items(inputs, model.num_items) if exclude_seen else None
    step = max(1, _SCORES_AT_ONCE // model.num_items)
    model_ranks, popularity_ranks = [], []
    for first in range(0, len(states), step):
        rows = slice(first, first + step)
        targets, hidden = inputs.targets[rows], None if seen is None else seen[rows]
        scores = model.score_items(states[rows])
        model_ranks.append(target_ranks(scores, targets, seen=hidden).cpu())
        popularity_ranks.append(target_ranks(popularity, targets, seen=hidden).cpu())
    logits = None
    if inputs.labels is not None and model.label_head is not None:
        logits = model.label_logits(states, inputs.targets).cpu()
    return _Scored(
        torch.cat(model_ranks),
        torch.cat(popularity_ranks),
        (inputs.targets > 0).cpu(),
        logits,
        None if inputs.labels is None else inputs.labels.cpu(),
    )


class _Totals:
    """All metrics of a run, adding up over batches and then over ranks."""

    def __init__(self, ks: Sequence[int]) -> None:
        self.model, self.popularity = RankingMetrics(ks), RankingMetrics(ks)
        self.entropy = NormalizedEntropy()
        self.counts = torch.zeros(3, dtype=torch.float64)  # read, evaluated, unknown targets

    def add(self, scored: _Scored) -> None:
        known = scored.known
        for metrics, ranks in (
            (self.model, scored.model_ranks),
            (self.popularity, scored.popularity_ranks),
        ):
            metrics.update(ranks[known])
            metrics.update_misses(int((~known).sum()))
        if scored.logits is not None and scored.labels is not None:
            self.entropy.update(scored.logits, scored.labels)
        self.counts[1] += len(known)
        self.counts[2] += int((~known).sum())

    def reduce(self, world: World) -> None:
        for metrics in (self.model, self.popularity, self.entropy):
            metrics.reduce(world.all_sum)
        self.counts = world.all_sum(self.counts)


class _NewestOfEachUser:
    """Keeps one scored example a user: the newest, and of equally new ones the last to come."""

    def __init__(self) -> None:
        self._times: dict[int, int] = {}
        self._rows: dict[int, tuple[int, int, bool, float, float]] = {}

    def candidates(self, users: Sequence[int], times: Sequence[int]) -> Tensor:
        """bool [B]: the newest of each user in this batch, unless a newer one came before."""
        last: dict[int, int] = {}
        for row, (user, time_us) in enumerate(zip(users, times, strict=True)):
            if user not in last or time_us >= times[last[user]]:
                last[user] = row
        chosen = torch.zeros(len(users), dtype=torch.bool)
        for user, row in last.items():
            chosen[row] = user not in self._times or times[row] >= self._times[user]
        return chosen

    def keep(self, users: Sequence[int], times: Sequence[int], scored: _Scored) -> None:
        """Add the examples that `candidates` chose."""
        columns = [
            scored.model_ranks.tolist(),
            scored.popularity_ranks.tolist(),
            scored.known.tolist(),
            [0.0] * len(users) if scored.logits is None else scored.logits.tolist(),
            [0.0] * len(users) if scored.labels is None else scored.labels.tolist(),
        ]
        for user, time_us, *row in zip(users, times, *columns, strict=True):
            self._times[user], self._rows[user] = time_us, tuple(row)

    def scored(self, *, labels: bool) -> _Scored:
        """Everything kept, as one batch."""
        model, popularity, known, logits, label = (
            zip(*self._rows.values(), strict=True) if self._rows else ((),) * 5
        )
        return _Scored(
            torch.tensor(model, dtype=torch.int64),
            torch.tensor(popularity, dtype=torch.int64),
            torch.tensor(known, dtype=torch.bool),
            torch.tensor(logits) if labels else None,
            torch.tensor(label) if labels else None,
        )


def _integers(batch: Batch, name: str) -> Tensor:
    """int64 [B]: an id column as it is, or 64 bits of the hash of each string."""
    if name not in batch.strings:
        return batch.examples[name].to(torch.int64)
    hashed = (hashlib.blake2b(text.encode(), digest_size=8) for text in batch.strings[name])
    return torch.tensor(
        [int.from_bytes(one.digest(), "little", signed=True) for one in hashed], dtype=torch.int64
    )


def _sampled(users: Tensor, requests: Tensor, share: float) -> Tensor:
    """bool [B]: a fixed pseudo-random choice of about `share` of all examples, whatever the
    order, the batch size or the number of ranks."""
    if share >= 1:
        return torch.ones(len(users), dtype=torch.bool)
    # int64 products wrap, which is what mixing wants (constants of SplitMix64).
    mixed = users * -7046029254386353131 + requests * -4658895280553007687
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return ((mixed >> 11) & ((1 << 53) - 1)).to(torch.float64) / 2.0**53 < share


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def evaluate(
    model: HSTU,
    vocabulary: Vocabulary,
    batches: Iterable[Batch],
    config: TrainingConfig,
    *,
    world: World | None = None,
    num_examples: int | None = None,
    on_batch: Callable[[int], None] = lambda num_examples: None,
) -> dict[str, Any]:
    """Evaluate `model` on this rank's `batches`; every rank returns the same result.

    Args:
        model: on the world's device; left in the mode it was in.
        batches: the loader's; for "last_per_user" all examples of a user on one rank.
        num_examples: of all ranks together; needed for `eval_max_examples`.
        on_batch: told how many examples this rank has read so far; may raise to stop.

    Returns:
        JSON values: `model` and `popularity` with `hr@K`, `ndcg@K` and `mrr` over all known
        items; `label` with `ne` (None with a `reason` where undefined) or None without labels;
        `num_examples` read, `num_evaluated`, `num_unknown_targets` (each a miss); and the rules
        that applied.
    """
    world = world or World()
    share = 1.0
    if config.eval_max_examples is not None:
        if num_examples is None:
            raise TrainingError(
                "eval_max_examples needs the number of examples", "Pass num_examples."
            )
        share = config.eval_max_examples / max(1, num_examples)
    popularity = vocabulary.counts.to(world.device)
    totals, newest = _Totals(config.eval_top_k), _NewestOfEachUser()
    started, was_training, num_read = time.monotonic(), model.training, 0
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                users, times = _integers(batch, "user_id"), batch.examples["request_time"]
                num_read += batch.batch_size
                on_batch(num_read)
                chosen = _sampled(users, _integers(batch, "request_id"), share)
                if config.eval_examples == "last_per_user":
                    rows = chosen.nonzero().squeeze(1)
                    last = newest.candidates(users[rows].tolist(), times[rows].tolist())
                    chosen = torch.zeros_like(chosen).index_fill_(0, rows[last], True)
                inputs = to_model_inputs(batch, vocabulary, config).select(chosen)
                if not inputs.num_examples:
                    continue
                scored = _score(
                    model,
                    inputs.to(world.device),
                    popularity,
                    exclude_seen=config.eval_exclude_seen,
                )
                if config.eval_examples == "last_per_user":
                    newest.keep(users[chosen].tolist(), times[chosen].tolist(), scored)
                else:
                    totals.add(scored)
    finally:
        model.train(was_training)
    if config.eval_examples == "last_per_user":
        totals.add(newest.scored(labels=config.label_column is not None))
    totals.counts[0] = num_read
    totals.reduce(world)
    return _result(totals, config, time.monotonic() - started)


def _result(totals: _Totals, config: TrainingConfig, seconds: float) -> dict[str, Any]:
    num_read, num_evaluated, num_unknown = (int(count) for count in totals.counts)
    if not num_read:
        raise TrainingError("the eval pointers hold no example", "Name windows that have requests.")
    label = None
    if config.label_column is not None:
        value = totals.entropy.compute()
        label = {
            "ne": _finite(value.ne),
            "log_loss": _finite(value.log_loss),
            "base_rate": _finite(value.base_rate),
            "num_examples": value.num_examples,
            "reason": value.reason,
        }
    return {
        "format_version": FORMAT_VERSION,
        "num_examples": num_read,
        "num_evaluated": num_evaluated,
        "num_unknown_targets": num_unknown,
        "examples": config.eval_examples,
        "max_examples": config.eval_max_examples,
        "exclude_seen": config.eval_exclude_seen,
        "ties": "count against the model",
        "model": {k: _finite(v) for k, v in totals.model.compute().items()},
        "popularity": {k: _finite(v) for k, v in totals.popularity.compute().items()},
        "label": label,
        "seconds": seconds,
    }


def evaluate_checkpoint(
    checkpoint: Checkpoint,
    config: TrainingConfig,
    world: World,
    *,
    on_batch: Callable[[int], None] = lambda num_examples: None,
) -> dict[str, Any]:
    """Evaluate a loaded checkpoint on the eval pointers of `config`; adds what was evaluated on
    what: the checkpoint's digest and the pins.

    Raises:
        TrainingError: no eval pointers, or the config does not fit the checkpoint.
    """
    from vlm_dagster.training.data import open_loader

    if config.eval_pointers is None:
        raise TrainingError("the config has no eval_pointers", "Add them to evaluate.")
    trained = checkpoint.model.config
    if config.model.to_json() != trained.to_json():
        raise TrainingError(
            f"the config's model {config.model} is not the checkpoint's {trained}",
            "Evaluate with the config of the training run; only eval options may differ.",
        )
    loader = open_loader(config.eval_pointers, config, world, shuffle=False)
    result = evaluate(
        checkpoint.model.to(world.device),
        checkpoint.vocabulary,
        loader,
        config,
        world=world,
        num_examples=loader.num_examples,
        on_batch=on_batch,
    )
    return {
        **result,
        "checkpoint_digest": checkpoint.manifest.digest,
        "weights_digest": checkpoint.manifest.weights_digest,
        "pins": {"eval": dict(config.eval_pointers)},
    }
