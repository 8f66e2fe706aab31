"""All that decides what is in a unit, as a value: the key under which a cache keeps it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from vlm_dagster.history import Snapshot
from vlm_dagster.loaders.plan import Unit
from vlm_dagster.pointers import PointerSnapshot
from vlm_dagster.schema import Projection
from vlm_dagster.sealed.gone import Removal

__all__ = ["CacheFacts"]

# Of what a unit's file holds, and of what its key is made from.
_FORMAT = 1


@dataclass(frozen=True)
class CacheFacts:
    """What units are read from, and what of it. Compacting a table changes none of it.

    Attributes:
        reads: the tables by id and digest, what has left them, and what is read of each; JSON-able.
        erased: by table id, the rows of erased users that have left so far.
    """

    reads: Mapping[str, Any]
    erased: Mapping[str, int]

    @classmethod
    def of(
        cls,
        pointers: PointerSnapshot,
        histories: Mapping[str, Snapshot],
        projections: Mapping[str, Projection],
        columns: Sequence[str],
        *,
        whole: bool | None = None,
    ) -> CacheFacts:
        """The facts of what is open here; `whole` as `DirectSource` has it."""
        pin = pointers.ref()
        reads: list[dict[str, Any]] = [
            {
                "table_id": pin.table_id,
                "digest": pin.digest,
                "removals": _removals(pointers.removals),
                "columns": [[name, str(pointers.spec.schema.field(name).type)] for name in columns],
            }
        ]
        erased = {pin.table_id: _num_erased(pointers.removals)}
        for group, projection in projections.items():
            found = histories[group]
            ref, schema = found.ref(), found.group.event_schema
            reads.append(
                {
                    "group": group,
                    "table_id": ref.table_id,
                    "digest": ref.digest,
                    "removals": _removals(found.removals),
                    "columns": [
                        [name, str(schema.field(name).type)]
                        for name in projection.columns(found.group)
                    ],
                    "max_length": projection.max_length,
                }
            )
            erased[ref.table_id] = _num_erased(found.removals)
        gone = any(read["removals"] for read in reads)
        facts = {
            "format": _FORMAT,
            "whole": whole if gone else None,
            "pointers": reads[0],
            "histories": reads[1:],
        }
        return cls(facts, erased)

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.reads).encode()).hexdigest()[:32]

    def key_of(self, unit: Unit, user_ids: pa.Array, *, verify: bool) -> bytes:
        """[16] the key of a unit among those of the same facts. Where events have left, `verify`
        decides which examples can be read (readable.py), unless that is decided for all."""
        users = pa.record_batch([user_ids], names=["user_id"]).serialize()
        decides = verify and self._has_gone and self.reads["whole"] is None
        hasher = hashlib.sha256(f"{unit.window} {unit.bucket} {decides}\n".encode())
        hasher.update(users)
        return hasher.digest()[:16]

    @cached_property
    def _has_gone(self) -> bool:
        tables = [self.reads["pointers"], *self.reads["histories"]]
        return any(table["removals"] for table in tables)

    def to_json(self) -> dict[str, Any]:
        return {"reads": self.reads, "erased": dict(self.erased)}

    @staticmethod
    def outdated(facts: Mapping[str, Any], other: Mapping[str, Any] | None) -> bool:
        """Whether facts are of a table from before an erasure that others know of; both as JSON."""
        known = {} if other is None else other["erased"]
        erased = facts["erased"]
        return any(erased[table] < num for table, num in known.items() if table in erased)


def _removals(removals: Sequence[Removal]) -> list[list[Any]]:
    return [[one.id, one.num_rows, one.through] for one in removals]


def _num_erased(removals: Sequence[Removal]) -> int:
    return sum(one.num_rows for one in removals if one.kind == "erasure")
