"""Where bulk work runs. An engine sorts a stream of rows that need not fit into memory.

The local engine (DuckDB, which spills) is the only one so far; another needs to offer `Engine`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import pyarrow as pa

__all__ = ["Engine"]


class Engine(Protocol):
    """Sorts rows, ascending and without nulls; strings by their UTF-8 bytes."""

    def sort(
        self,
        batches: Iterator[pa.RecordBatch],
        schema: pa.Schema,
        by: Sequence[str],
        scratch: Path,
    ) -> Iterator[pa.RecordBatch]:
        """The same rows ordered by the columns `by`. `scratch` is a local folder for spilling.

        An exception raised by `batches` comes out unchanged.
        """
        ...
