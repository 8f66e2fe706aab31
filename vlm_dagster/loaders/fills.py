"""What stands where there is nothing, and up to which length: checked before torch would convert it."""

from __future__ import annotations

import math

import torch

from vlm_dagster.errors import SchemaError

__all__ = ["check_fill", "check_length"]


def check_length(max_length: int | None) -> None:
    """SchemaError unless it is None or a length."""
    if max_length is not None and max_length < 0:
        raise SchemaError(f"max_length={max_length}", "Use an integer of 0 or more, or None.")


def check_fill(trait: str, kind: torch.dtype, value: float) -> None:
    """SchemaError unless a trait's type holds the value as it is; floats may round it."""
    if kind.is_floating_point:
        most = torch.finfo(kind).max
        if -most <= value <= most or value != value or abs(value) == math.inf:
            return
        allowed = f"a number from {-most:.3g} to {most:.3g}, an infinity or NaN"
    else:
        low, high = (0, 1) if kind == torch.bool else (torch.iinfo(kind).min, torch.iinfo(kind).max)
        if low <= value <= high and value == int(value):  # NaN is neither
            return
        allowed = f"a whole number from {low} to {high}"
    raise SchemaError(f"{value!r} for trait {trait!r}, which is {kind}", f"Use {allowed}.")
