"""What an HSTU model is made of: a frozen value that validates itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from vlm_dagster.errors import SchemaError
from vlm_dagster.schema import check_name

__all__ = ["CategoricalTrait", "HSTUConfig"]

Encoding = Literal["code", "hash"]


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SchemaError(f"{name}={value!r} is not valid", f"Use an integer of {least} or more.")


@dataclass(frozen=True)
class CategoricalTrait:
    """A trait of past events that is embedded and added to the item's embedding.

    Attributes:
        name: the trait's name in the projection.
        num_values: how many embeddings it has. With encoding "code" the value v in
            [0, num_values) has its own, and all other values share one more. With encoding
            "hash" every value is hashed into one of them, so that open-ended ids fit.
        encoding: "code" or "hash". A fractional value counts as its integer part (floor).
    """

    name: str
    num_values: int
    encoding: Encoding = "code"

    def __post_init__(self) -> None:
        check_name(self.name, "categorical trait")
        _check_count(f"categorical trait {self.name!r}: num_values", self.num_values, 1)
        if self.encoding not in get_args(Encoding):
            raise SchemaError(
                f"categorical trait {self.name!r}: encoding={self.encoding!r} is unknown",
                f"Use one of {', '.join(get_args(Encoding))}.",
            )


@dataclass(frozen=True)
class HSTUConfig:
    """The shape of an HSTU model (arXiv 2402.17152), without the number of items.

    Attributes:
        max_length: the most past events a sequence may hold.
        dim: width of item embeddings and of the residual stream.
        num_layers: HSTU layers.
        num_heads: attention heads; divides dim.
        dropout: share of inputs and layer outputs dropped in training, in [0, 1).
        traits: categorical side traits of past events.
        num_time_buckets: buckets of elapsed time in the relative time bias: half-octaves of
            seconds, so 64 reach 130 years.
        temperature: the cosine of state and item embedding is divided by this.
        full_softmax_max_items: up to so many items the next-item loss is a full softmax; above,
            a sampled softmax with log-uniform negatives and logQ correction.
        num_negatives: negatives shared by a batch in the sampled softmax.
        label_head: whether the model also predicts a binary label of (user, candidate item).
    """

    max_length: int = 64
    dim: int = 64
    num_layers: int = 2
    num_heads: int = 2
    dropout: float = 0.1
    traits: tuple[CategoricalTrait, ...] = ()
    num_time_buckets: int = 64
    temperature: float = 0.1
    full_softmax_max_items: int = 10_000
    num_negatives: int = 4_096
    label_head: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "traits", tuple(self.traits))
        for name in (
            "max_length",
            "dim",
            "num_layers",
            "num_heads",
            "num_time_buckets",
            "num_negatives",
        ):
            _check_count(name, getattr(self, name), 1)
        _check_count("full_softmax_max_items", self.full_softmax_max_items, 0)
        if self.dim % self.num_heads:
            raise SchemaError(
                f"dim={self.dim} does not divide into num_heads={self.num_heads}",
                "Choose dim as a multiple of num_heads.",
            )
        if not 0 <= self.dropout < 1:
            raise SchemaError(f"dropout={self.dropout!r} is not a share", "Use 0 <= dropout < 1.")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise SchemaError(
                f"temperature={self.temperature!r} is not a scale", "Use a number above 0."
            )
        names = [trait.name for trait in self.traits]
        if len(set(names)) != len(names):
            raise SchemaError(f"traits {names} name one twice", "Drop one of them.")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "traits": [asdict(trait) for trait in self.traits]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> HSTUConfig:
        """The config that `to_json` wrote. SchemaError for a name it does not know."""
        known = set(cls.__dataclass_fields__)
        unknown = sorted(set(value) - known)
        if unknown:
            raise SchemaError(
                f"model options hold {unknown[0]!r}, which is unknown",
                f"Known ones are {', '.join(sorted(known))}.",
            )
        traits: Sequence[dict[str, Any]] = value.get("traits", ())
        return cls(**{**value, "traits": tuple(CategoricalTrait(**trait) for trait in traits)})
