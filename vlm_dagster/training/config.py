"""What a training run reads and does: a frozen value, stored with the checkpoint it leads to."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from vlm_dagster.errors import SchemaError
from vlm_dagster.models.config import HSTUConfig
from vlm_dagster.schema import Projection, check_name

__all__ = ["EvalExamples", "TrainingConfig"]

FORMAT_VERSION = 1
EvalExamples = Literal["all", "last_per_user"]
_DEVICE_TYPES = ("auto", "cpu", "cuda")


def _check_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SchemaError(f"{name}={value!r} is not valid", f"Use an integer of {least} or more.")


def _check_float(name: str, value: object, *, above: float | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise SchemaError(f"{name}={value!r} is not a number", "Use a finite number.")
    if above is not None and value <= above:
        raise SchemaError(f"{name}={value!r} is out of range", f"Use a number above {above}.")
    if value < 0:
        raise SchemaError(f"{name}={value!r} is negative", "Use 0 or more.")


@dataclass(frozen=True)
class TrainingConfig:
    """A training run. Credentials never belong here: storage reads them from the environment.

    Attributes:
        train_pointers: `PointerRef.to_json()` of the windows to train on.
        checkpoint_dir: folder that gets the checkpoint and the evaluation.
        eval_pointers: `PointerRef.to_json()` of the windows to evaluate on, or None.
        group: the feature group whose history the model reads.
        item_trait: the trait that holds the item id, an integer.
        time_trait: the trait that holds each event's time, in UTC microseconds: "available_at",
            "event_time", or a timestamp trait.
        target_column: the column of the examples that holds the item each is about; None means
            that it is called as the item trait is.
        label_column: the column of the examples that holds a binary label; None trains and
            evaluates next items only.
        model: the model's shape. Its `label_head` is set from `label_column`.
        batch_size: examples a step, per rank.
        learning_rate: AdamW's, after warm-up.
        weight_decay: AdamW's.
        warmup_steps: steps over which the learning rate rises linearly to its value.
        max_grad_norm: gradients are scaled down to this norm.
        label_weight: weight of the label loss beside the next-item loss.
        epochs: passes over the training pointers.
        max_steps: stop after so many steps; None for no limit.
        max_seconds: stop after so many seconds of training; None for no limit. A run that ends
            for this reason is not reproducible bit by bit.
        seed: seeds weights, dropout, negatives and the order of examples.
        num_workers: threads or processes that read, per rank; see `SequenceLoader`, as for all of the
            loader's options: workers, prefetch, lanes, verify, cache.
        mix: how many of the loader's units have their examples shuffled with each other, see
            `SequenceLoader`. Few make a short run see few users; the loader's memory grows with it.
        gone: what happens where examples point at events that were erased, or dropped by age: "fail",
            or "drop" these examples and count them.
        device: "auto" (CUDA if there is one, else the CPU), "cpu" or "cuda".
        num_threads: CPU threads of torch per rank; None shares this machine's cores out evenly.
        vocabulary_min_count: items seen fewer times in training are unknown.
        vocabulary_max_size: at most so many items, the most frequent; None for all.
        eval_batch_size: examples scored at once, per rank.
        eval_examples: "all", or "last_per_user" for only the newest example of each user.
        eval_max_examples: evaluate about so many examples, a fixed pseudo-random choice by user
            and request id; None for all. It applies before `eval_examples`.
        eval_exclude_seen: rank only items that are not in the history the model read; for data
            in which nobody meets an item twice.
        eval_top_k: cut-offs K of HR@K and NDCG@K.
    """

    train_pointers: Mapping[str, Any]
    checkpoint_dir: str
    eval_pointers: Mapping[str, Any] | None = None
    group: str = "events"
    item_trait: str = "item_id"
    time_trait: str = "available_at"
    target_column: str | None = None
    label_column: str | None = None
    model: HSTUConfig = field(default_factory=HSTUConfig)
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    warmup_steps: int = 30
    max_grad_norm: float = 1.0
    label_weight: float = 1.0
    epochs: int = 1
    max_steps: int | None = None
    max_seconds: float | None = None
    seed: int = 0
    num_workers: int = 2
    workers: Literal["threads", "processes"] = "threads"
    prefetch: int = 2
    lanes: int = 8
    verify: Literal["always", "sampled", "off"] = "always"
    cache: str | None = None
    mix: int = 16
    gone: Literal["fail", "drop"] = "fail"
    device: str = "auto"
    num_threads: int | None = None
    vocabulary_min_count: int = 1
    vocabulary_max_size: int | None = None
    eval_batch_size: int = 256
    eval_examples: EvalExamples = "all"
    eval_max_examples: int | None = None
    eval_exclude_seen: bool = False
    eval_top_k: tuple[int, ...] = (10,)

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        for name in ("train_pointers", "eval_pointers"):
            pointers = getattr(self, name)
            if pointers is None and name == "eval_pointers":
                continue
            if not isinstance(pointers, Mapping):
                raise SchemaError(f"{name}={pointers!r} is not a pin", "Give PointerRef.to_json().")
            # A private copy: the caller may go on changing its own.
            set_(self, name, copy.deepcopy(dict(pointers)))
        set_(self, "checkpoint_dir", os.fspath(self.checkpoint_dir))
        if not self.checkpoint_dir:
            raise SchemaError("checkpoint_dir is empty", "Name a folder.")
        for what, value in (
            ("group", self.group),
            ("item trait", self.item_trait),
            ("time trait", self.time_trait),
        ):
            check_name(value, what)
        for what, column in (("target", self.target_column), ("label", self.label_column)):
            if column is not None:
                check_name(column, f"{what} column")
        set_(self, "model", replace(self.model, label_head=self.label_column is not None))
        for trait in self.model.traits:
            if trait.name in (self.item_trait, self.time_trait):
                raise SchemaError(
                    f"categorical trait {trait.name!r} is the item or the time trait",
                    "The model reads those already; drop it from the model's traits.",
                )
        self._check_numbers()
        set_(self, "eval_top_k", tuple(self.eval_top_k))

    def _check_numbers(self) -> None:
        for name in (
            "batch_size",
            "epochs",
            "lanes",
            "vocabulary_min_count",
            "eval_batch_size",
        ):
            _check_int(name, getattr(self, name), 1)
        for name in ("warmup_steps", "seed", "num_workers", "prefetch", "mix"):
            _check_int(name, getattr(self, name), 0)
        for name in ("max_steps", "num_threads", "vocabulary_max_size", "eval_max_examples"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1)
        for k in self.eval_top_k:
            _check_int("eval_top_k", k, 1)
        if not self.eval_top_k:
            raise SchemaError("eval_top_k is empty", "Give at least one cut-off, e.g. [10].")
        for name in ("learning_rate", "max_grad_norm"):
            _check_float(name, getattr(self, name), above=0)
        for name in ("weight_decay", "label_weight"):
            _check_float(name, getattr(self, name))
        if self.max_seconds is not None:
            _check_float("max_seconds", self.max_seconds, above=0)
        if self.device not in _DEVICE_TYPES:
            raise SchemaError(
                f"device={self.device!r} is unknown", f"Use one of {', '.join(_DEVICE_TYPES)}."
            )
        for name, choices in (
            ("workers", ("threads", "processes")),
            ("verify", ("always", "sampled", "off")),
        ):
            if getattr(self, name) not in choices:
                raise SchemaError(
                    f"{name}={getattr(self, name)!r} is unknown",
                    f"Use one of {', '.join(choices)}.",
                )
        if self.gone not in ("fail", "drop"):
            raise SchemaError(f"gone={self.gone!r} is unknown", "Use 'fail' or 'drop'.")
        if self.eval_examples not in get_args(EvalExamples):
            raise SchemaError(
                f"eval_examples={self.eval_examples!r} is unknown",
                f"Use one of {', '.join(get_args(EvalExamples))}.",
            )

    @property
    def projections(self) -> dict[str, Projection]:
        """What the loader reads: exactly the traits and the length that the model uses."""
        traits = [self.item_trait, self.time_trait, *(t.name for t in self.model.traits)]
        return {self.group: Projection(traits, self.model.max_length)}

    @property
    def example_target(self) -> str:
        """The column of the examples that holds the target item."""
        return self.target_column or self.item_trait

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON: equal configs have equal digests."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        values = {f.name: copy.deepcopy(getattr(self, f.name)) for f in fields(self)}
        values["model"] = self.model.to_json()
        values["eval_top_k"] = list(self.eval_top_k)
        return {"format_version": FORMAT_VERSION, **values}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TrainingConfig:
        """The config that `to_json` wrote. Options left out keep their defaults.

        Raises:
            SchemaError: an unknown format version or option, or a bad value.
        """
        options = dict(value)
        version = options.pop("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise SchemaError(
                f"training config has format version {version!r}",
                f"This code knows version {FORMAT_VERSION}: upgrade the package.",
            )
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise SchemaError(
                f"training config holds {unknown[0]!r}, which is unknown",
                f"Known options are {', '.join(sorted(known))}.",
            )
        for name in ("train_pointers", "checkpoint_dir"):
            if name not in options:
                raise SchemaError(f"training config lacks {name!r}", "Add it.")
        if "model" in options:
            options["model"] = HSTUConfig.from_json(options["model"])
        return cls(**options)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TrainingConfig:
        """Read a JSON file. SchemaError when it is missing or no such config."""
        try:
            value = json.loads(Path(path).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise SchemaError(
                f"training config {os.fspath(path)} cannot be read ({error})",
                "Give a JSON file as TrainingConfig.to_json() makes it.",
            ) from None
        if not isinstance(value, dict):
            raise SchemaError(
                f"training config {os.fspath(path)} holds a {type(value).__name__}",
                "Give a JSON object.",
            )
        return cls.from_json(value)
