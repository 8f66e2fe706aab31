"""Calling a user's function for the rows of one window, with what it asks for by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from vlm_dagster.errors import SchemaError
from vlm_dagster.windows import Window

__all__ = ["WindowSource"]


class WindowSource:
    """A function `(window, ...) -> rows`, checked when the asset is defined.

    Its first parameter receives the `Window`. Every further one is passed by name, and must be one
    of `offered` or have a default.
    """

    def __init__(
        self, function: Callable[..., Any], *, what: str, offered: Mapping[str, str]
    ) -> None:
        if not callable(function):
            raise SchemaError(
                f"{what}={function!r} is not a function",
                f"Pass a function: {what}(window) -> rows.",
            )
        parameters = list(inspect.signature(function).parameters.values())
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        choice = "; ".join(f"`{name}` is {meaning}" for name, meaning in offered.items())
        if not named or named[0].kind is inspect.Parameter.KEYWORD_ONLY:
            raise SchemaError(
                f"{what} takes no window",
                f"Its first parameter receives the Window. Beside it: {choice}.",
            )
        rest = named[1:]
        unknown = [p.name for p in rest if p.name not in offered and p.default is p.empty]
        if unknown:
            raise SchemaError(
                f"{what} asks for {unknown[0]!r}, which nobody provides",
                f"After the window it can ask for these by name: {choice}.",
            )
        self._function = function
        self._asked = [p.name for p in rest if p.name in offered]

    def __call__(self, window: Window, **offered: Any) -> Any:
        return self._function(window, **{name: offered[name] for name in self._asked})
