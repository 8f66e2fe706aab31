"""Our errors as Dagster failures: the message at the top of the run page, its values as metadata."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dagster as dg

from vlm_dagster.errors import StorageError, VlmError, WindowSealedError

__all__ = ["told_to_dagster"]


@contextmanager
def told_to_dagster() -> Iterator[None]:
    """Turns a `VlmError` into a `dg.Failure` that carries its message and values.

    Only trouble with storage may pass by itself, so only that is left to a retry policy.
    """
    try:
        yield
    except VlmError as error:
        metadata: dict[str, Any] = {"error": type(error).__name__}
        if isinstance(error, WindowSealedError):
            metadata |= {
                "table": error.table,
                "window": error.window,
                "sealed_digest": error.sealed,
                "offered_digest": error.offered,
            }
        raise dg.Failure(
            description=str(error),
            metadata=metadata,
            allow_retries=isinstance(error, StorageError),
        ) from error
