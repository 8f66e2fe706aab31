"""TorchRec's KeyedJaggedTensor; the only module that imports torchrec, which is an optional extra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlm_dagster.errors import SchemaError

if TYPE_CHECKING:
    from torchrec import KeyedJaggedTensor

    from vlm_dagster.loaders.jagged import JaggedSequence

__all__ = ["to_kjt"]

_INSTALL = (
    "Install it beside torch 2.13 with `pip install fbgemm-gpu==1.8.0 torchrec==1.8.0` (CUDA), or "
    "with `pip install fbgemm-gpu-cpu==1.8.0 tensordict pyre-extensions torchmetrics==1.0.3 tqdm` "
    "and `pip install --no-deps torchrec==1.8.0` (no GPU: torchrec's own requirement would bring the "
    "CUDA build)."
)


def to_kjt(sequence: JaggedSequence, traits: Sequence[str], *, unique: bool) -> KeyedJaggedTensor:
    """See `JaggedSequence.to_kjt`."""
    keys, num_keys = list(traits), len(traits)
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise SchemaError(f"trait {twice[0]!r} is named twice", "Name each trait once.")
    try:
        from torchrec import KeyedJaggedTensor
    except (ImportError, OSError) as error:  # OSError: fbgemm's build does not fit torch's
        raise SchemaError(f"torchrec cannot be imported ({error})", _INSTALL) from error
    whole = sequence.unique.expand(traits) if unique else sequence.expand(traits)
    if not keys:
        raise SchemaError("a KeyedJaggedTensor of no traits", "Name at least one trait.")
    values = torch.cat([column.to(_common_type(whole.values)) for column in whole.values.values()])
    sizes = {
        "length_per_key": [whole.num_events] * num_keys,
        "offset_per_key": [whole.num_events * key for key in range(num_keys + 1)],
    }
    lengths = whole.lengths.repeat(num_keys)
    if not unique:
        return KeyedJaggedTensor(
            keys=keys, values=values, lengths=lengths, stride=whole.batch_size, **sizes
        )
    return KeyedJaggedTensor(
        keys=keys,
        values=values,
        lengths=lengths,
        stride_per_key_per_rank=[[whole.batch_size]] * num_keys,
        inverse_indices=(keys, sequence.inverse.repeat(num_keys, 1)),
        **sizes,
    )


def _common_type(values: dict[str, Tensor]) -> torch.dtype:
    kinds = {column.dtype for column in values.values()}
    if len({kind.is_floating_point for kind in kinds}) > 1:
        named = ", ".join(f"{name} {column.dtype}" for name, column in values.items())
        raise SchemaError(
            f"one KeyedJaggedTensor cannot hold whole numbers and floats exactly ({named})",
            "Make two: to_kjt(traits=[...]) of each kind.",
        )
    common = kinds.pop()
    for kind in kinds:
        common = torch.promote_types(common, kind)
    return common
