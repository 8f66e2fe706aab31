"""What a sealed table is declared to hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from vlm_dagster.sealed.stripes import Stripes
from vlm_dagster.sealed.users import Extreme
from vlm_dagster.windows import Window, WindowGrid

__all__ = ["TABLE_FORMAT", "TableSpec"]

TABLE_FORMAT = 2


@dataclass(frozen=True)
class TableSpec:
    """What a sealed table is declared to hold; stored as JSON in the Delta table's description.

    Attributes:
        kind: "history" or "pointers".
        name: the table's name.
        columns: the stored columns without the partition columns; the first is `user_id`.
        sort_columns: the rows' order within a file: user, time, id.
        num_buckets: how many hash buckets of users.
        grid: the windows.
        start: the first window, or None: then the first window sealed is the first.
        details: what the owner of the table needs to open it again, JSON-able.
        extremes: what the files' indices keep about every user; follows from `details`.
        stripes: the recency bands of its files; a file records its own.
        encodings: of columns that are not encoded as their type would be; follows from `details`.
    """

    kind: str
    name: str
    columns: pa.Schema
    sort_columns: tuple[str, str, str]
    num_buckets: int
    grid: WindowGrid
    start: Window | None
    details: dict[str, Any] = field(hash=False)
    extremes: tuple[Extreme, ...] = ()
    stripes: Stripes = field(default_factory=Stripes)
    encodings: dict[str, str] = field(default_factory=dict, hash=False)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": TABLE_FORMAT,
            "kind": self.kind,
            "num_buckets": self.num_buckets,
            "windows": self.grid.cadence,
            "start": self.start.key if self.start else None,
            "bands": list(self.stripes.edges),
            **self.details,
        }

    @property
    def delta_schema(self) -> pa.Schema:
        return pa.schema(
            [*self.columns, pa.field("segment", pa.string()), pa.field("bucket", pa.int32())]
        )

    @property
    def start_index(self) -> int | None:
        """The index of the declared first window."""
        return self.start.index if self.start else None
