"""Sequential recommender models. They know tensors only: no loader, no storage, no Dagster.

`CategoricalTrait` and `HSTUConfig` load without torch, so that a Dagster code location can build a
training config; the rest is imported when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

from vlm_dagster.models.config import CategoricalTrait, HSTUConfig

if TYPE_CHECKING:
    from vlm_dagster.models.hstu import HSTU, LossSums
    from vlm_dagster.models.inputs import ModelInputs

__all__ = ["HSTU", "CategoricalTrait", "HSTUConfig", "LossSums", "ModelInputs"]

_LAZY = {"HSTU": "hstu", "LossSums": "hstu", "ModelInputs": "inputs"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
