"""Committing where others commit too: look again and try again, until the log lets one through."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from deltalake.exceptions import CommitFailedError, DeltaError

from vlm_dagster.errors import StorageError

__all__ = ["attempted"]

T = TypeVar("T")

# With a hundred sealers at once, somebody may lose as often.
_MAX_TRIES = 300


def attempted(uri: str, doing: str, attempt: Callable[[], T]) -> T:
    """What `attempt` returns, called again while the log refuses it for another's commit.

    Args:
        attempt: opens the newest version, looks, and commits with that very handle.

    Raises:
        StorageError: storage refused, or others kept winning.
    """
    problem: BaseException | None = None
    for number in range(_MAX_TRIES):
        try:
            return attempt()
        except CommitFailedError as error:
            problem = error
            time.sleep(min(0.002 * 2 ** min(number, 10), 0.25) * random.uniform(0.5, 1.5))
        except StorageError:
            raise
        except (DeltaError, OSError) as error:
            raise StorageError(uri, doing, error) from error
    raise StorageError(
        uri,
        f"{doing} ({_MAX_TRIES} tries, others kept winning)",
        problem or RuntimeError("no try was made"),
    )
