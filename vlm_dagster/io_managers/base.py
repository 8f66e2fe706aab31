"""What all IO managers of this package share."""

from __future__ import annotations

import inspect
from typing import Any

import dagster as dg

__all__ = ["DescribedIOManager"]


class DescribedIOManager(dg.ConfigurableIOManager):
    """An IO manager whose docstring reads well in the UI."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # The UI renders it as Markdown, where indented lines are code.
        cls.__doc__ = inspect.cleandoc(cls.__doc__ or "")
