"""What decides which batches an epoch has, as one frozen value that a loader's state carries."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from vlm_dagster.errors import SchemaError

__all__ = ["Balance", "Form", "OrderOf", "OrderOptions", "Uneven", "check_choice", "check_int"]

Form = Literal["expanded", "views", "deduplicated"]
OrderOf = Literal["shuffled", "stored", "time"]
Balance = Literal["tokens", "flops"]
Uneven = Literal["keep", "drop", "repeat", "pad"]


# Sequences' lengths times this stay far below 2^63.
_LONGEST = 1 << 30


def check_int(name: str, value: object, least: int) -> None:
    """SchemaError unless it is an integer of at least so much."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SchemaError(f"{name}={value!r}", f"Use an integer of {least} or more.")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """SchemaError unless it is one of the choices."""
    if value not in choices or isinstance(value, bool):
        shown = [repr(choice) for choice in choices]
        raise SchemaError(f"{name}={value!r}", f"Use {', '.join(shown[:-1])} or {shown[-1]}.")


@dataclass(frozen=True)
class OrderOptions:
    """Which examples come in which batch, the same on every rank, for any number of ranks.

    Attributes:
        batch_size: examples a batch, per rank; with `max_tokens`, at most so many.
        max_tokens: events a batch, per rank, over all groups as the model sees them; an example that
            alone has more makes a batch of its own. None cuts by examples alone.
        balance: deal the examples of a pool to its batches so that these cost about the same: events
            ("tokens"), or events weighted by their sequence's length ("flops"). None deals none.
        balance_length: for "flops", the sequence length at which attention, which grows with the
            square, costs as much as all else.
        uneven: what happens at the end of an epoch, where ranks would have different numbers of
            batches or the last batch is smaller: see `SequenceLoader`.
        seed: of the shuffle, together with the epoch.
        order: "shuffled", "stored" or "time".
        mix: how many units have their examples shuffled with each other; 0 keeps each user's
            examples together.
        lanes: how many pools batches are taken from in turn.
        examples_per_unit, events_per_unit: what is read at once, at most (or one user).
        events_per_pool: of the units shuffled with each other, at most (or one unit).
    """

    batch_size: int
    max_tokens: int | None
    balance: Balance | None
    balance_length: int
    uneven: Uneven
    seed: int
    order: OrderOf
    mix: int
    lanes: int
    examples_per_unit: int
    events_per_unit: int
    events_per_pool: int

    def __post_init__(self) -> None:
        for name, least in (
            ("batch_size", 1),
            ("balance_length", 1),
            ("seed", 0),
            ("mix", 0),
            ("lanes", 1),
            ("examples_per_unit", 1),
            ("events_per_unit", 1),
            ("events_per_pool", 1),
        ):
            check_int(name, getattr(self, name), least)
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, 1)
        if self.balance_length > _LONGEST:
            raise SchemaError(
                f"balance_length={self.balance_length}", f"Use an integer of {_LONGEST:,} at most."
            )
        check_choice("balance", self.balance, (None, *get_args(Balance)))
        check_choice("uneven", self.uneven, get_args(Uneven))
        check_choice("order", self.order, get_args(OrderOf))
        if self.balance is not None and self.max_tokens is not None:
            raise SchemaError(
                f"balance={self.balance!r} with max_tokens={self.max_tokens}",
                "Batches cut by tokens cost the same already: use one of the two.",
            )
        if self.balance is not None and self.order != "shuffled":
            raise SchemaError(
                f"balance={self.balance!r} with order={self.order!r}",
                "Balancing changes the order of examples: use order='shuffled'.",
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
