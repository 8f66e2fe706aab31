"""Options that the factories of this package share."""

from __future__ import annotations

import enum
import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import dagster as dg
from pydantic import Field

from vlm_dagster.errors import SchemaError

__all__ = [
    "AssetKeyLike",
    "HistorySealConfig",
    "OnSealed",
    "SealConfig",
    "beta_features",
    "declared_version",
    "on_sealed_of",
]

AssetKeyLike = dg.AssetKey | str | Sequence[str]
"""An asset key, its name, or its path."""


class OnSealed(enum.Enum):
    """What materializing a window does that is sealed already."""

    VERIFY = "verify"
    REUSE = "reuse"


class SealConfig(dg.Config):
    """Run configuration of assets that seal windows (the launchpad shows it)."""

    on_sealed: OnSealed | None = Field(
        default=None,
        description=(
            "What to do with a window that is sealed already. VERIFY reads the source again and "
            "compares digests: the same content is reused, other content fails the run. REUSE does "
            "not read the source and keeps what is sealed. Empty: as the asset declares."
        ),
    )


class HistorySealConfig(SealConfig):
    """Run configuration of history assets."""

    correct_because: str | None = Field(
        default=None,
        description=(
            "Replace windows that are sealed with other content than the source gives now, for this "
            "reason, which is recorded. Each becomes its next revision; what was pinned before "
            "keeps replaying the old one. Empty: other content fails the run."
        ),
    )


def on_sealed_of(value: str | OnSealed) -> OnSealed:
    """The option as an enum, or SchemaError."""
    try:
        return OnSealed(value)
    except ValueError:
        raise SchemaError(
            f"on_sealed={value!r} is unknown",
            "Use 'verify' (compare what the source says now with what is sealed) or 'reuse' "
            "(keep what is sealed without reading the source).",
        ) from None


def declared_version(*declaration: Any) -> str:
    """A code version that changes exactly when a declaration does."""
    text = json.dumps(declaration, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextmanager
def beta_features() -> Iterator[None]:
    """Uses features of Dagster that it calls beta, without a warning for each user of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)
        yield
