"""What a pointer dataset is declared to hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from vlm_dagster.errors import SchemaError
from vlm_dagster.schema import TIME_TYPE, Trait, check_name
from vlm_dagster.sealed.users import Extreme

__all__ = ["PointerSpec", "pointer_fields"]

_POINTER_PARTS = ("end_position", "length", "start_time", "end_time", "checksum")


def pointer_fields(group: str) -> dict[str, str]:
    """The stored column of each part of a group's pointer, e.g. `length` -> `ratings_length`."""
    return {part: f"{group}_{part}" for part in _POINTER_PARTS}


@dataclass(frozen=True)
class PointerSpec:
    """The declaration of a pointer dataset.

    Attributes:
        name: the dataset's name.
        groups: the feature groups whose histories its examples point into.
        columns: what else an example carries: labels, candidate features. Never null, unless
            declared with `missing`.
        request: how a request says when it was made. "event_id": it names an event of
            `target_group`, which is to be predicted, and its time is that event's
            `available_at`. "request_time": it says so itself.
        target_group: for "event_id"; the first group if not given.
        max_length: the newest so many events that a pointer spans; None means all.
        user_id, request_id: their types. With "event_id" the request id is the event id, of the
            type declared here. With "request_time" the requests carry a `request_id`.
        duplicates: a second request of one user with the same id in one window: "refuse" it, or
            keep the "first" in input order and count.
    """

    name: str
    groups: tuple[str, ...]
    columns: tuple[Trait, ...]
    request: Literal["event_id", "request_time"]
    target_group: str
    max_length: int | None
    user_id: pa.DataType = field(hash=False)
    request_id: pa.DataType = field(hash=False)
    duplicates: Literal["refuse", "first"] = "refuse"

    def __init__(
        self,
        name: str,
        groups: Sequence[str],
        columns: Sequence[Trait] = (),
        *,
        request: Literal["event_id", "request_time"] = "event_id",
        target_group: str | None = None,
        max_length: int | None = None,
        user_id: pa.DataType | None = None,
        request_id: pa.DataType | None = None,
        duplicates: Literal["refuse", "first"] = "refuse",
    ) -> None:
        set_ = object.__setattr__
        set_(self, "name", check_name(name, "pointer dataset name"))
        if isinstance(groups, str):
            raise SchemaError(f"groups={groups!r} is one string", f"Write groups=[{groups!r}].")
        set_(self, "groups", tuple(check_name(g, "feature group name") for g in groups))
        set_(self, "columns", tuple(columns))
        set_(self, "request", request)
        set_(self, "target_group", target_group or (self.groups[0] if self.groups else ""))
        set_(self, "max_length", max_length)
        set_(self, "user_id", user_id or pa.int64())
        set_(self, "request_id", request_id or pa.int64())
        set_(self, "duplicates", duplicates)
        self._validate()

    def _validate(self) -> None:
        if not self.groups:
            raise SchemaError(
                f"pointer dataset {self.name!r} has no feature groups",
                "Name at least one whose histories its examples need.",
            )
        if len(set(self.groups)) != len(self.groups):
            raise SchemaError(f"groups {list(self.groups)} repeat one", "Name each group once.")
        if self.request not in ("event_id", "request_time"):
            raise SchemaError(
                f"request={self.request!r} is unknown", "Use 'event_id' or 'request_time'."
            )
        if self.duplicates not in ("refuse", "first"):
            raise SchemaError(
                f"duplicates={self.duplicates!r} is unknown", "Use 'refuse' or 'first'."
            )
        for what, kind in (("user_id", self.user_id), ("request_id", self.request_id)):
            if kind not in (pa.int64(), pa.string()):
                raise SchemaError(
                    f"pointer dataset {self.name!r} has {what} type {kind}", "Use int64 or string."
                )
        if self.target_group not in self.groups:
            raise SchemaError(
                f"target_group={self.target_group!r} is not among the groups {list(self.groups)}",
                "Name the group whose events are predicted.",
            )
        if self.max_length is not None and (
            isinstance(self.max_length, bool)
            or not isinstance(self.max_length, int)
            or self.max_length < 1
        ):
            raise SchemaError(
                f"max_length={self.max_length!r} is not a number of events",
                "Use an integer of 1 or more, or None for whole histories.",
            )
        taken = set(self.stored_names(of_requests=False))
        for trait in self.columns:
            if trait.name in taken or trait.name in ("request_id", "request_time"):
                raise SchemaError(
                    f"column name {trait.name!r} is taken by the pointers themselves",
                    "Choose another name.",
                )
            taken.add(trait.name)

    def stored_names(self, *, of_requests: bool = True) -> list[str]:
        """The pointers' own columns, and with `of_requests` those of the requests too."""
        own = [name for group in self.groups for name in pointer_fields(group).values()]
        return [*(t.name for t in self.columns), *own] if of_requests else own

    @property
    def schema(self) -> pa.Schema:
        """The stored columns of one example, without the partition columns."""
        fields = [
            pa.field("user_id", self.user_id, nullable=False),
            pa.field("request_id", self.request_id, nullable=False),
            pa.field("request_time", TIME_TYPE, nullable=False),
            *(pa.field(t.name, t.type, nullable=False) for t in self.columns),
        ]
        for group in self.groups:
            for part, name in pointer_fields(group).items():
                kind = TIME_TYPE if part.endswith("_time") else pa.int64()
                fields.append(pa.field(name, kind, nullable=False))
        return pa.schema(fields)

    @property
    def extremes(self) -> tuple[Extreme, ...]:
        """What a file's index keeps about each user's pointers into each group: the first position
        of any (`GROUP_first`) and the least and greatest end position (`GROUP_low`, `GROUP_high`).
        A loader's plan bounds what a unit will hold with these, before it reads a column."""
        found = []
        for group in self.groups:
            names = pointer_fields(group)
            end, length = names["end_position"], names["length"]
            found += [
                Extreme(f"{group}_first", "min", end, length),
                Extreme(f"{group}_low", "min", end),
                Extreme(f"{group}_high", "max", end),
            ]
        return tuple(found)

    @property
    def request_schema(self) -> pa.Schema:
        """The columns of a request once read: ids, its time if it says it, and `columns`."""
        stored = self.schema
        names = ["user_id", "request_id"]
        if self.request == "request_time":
            names.append("request_time")
        return pa.schema([stored.field(n) for n in [*names, *(t.name for t in self.columns)]])

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "groups": list(self.groups),
            "columns": [t.to_json() for t in self.columns],
            "request": self.request,
            "target_group": self.target_group,
            "max_length": self.max_length,
            "user_id": str(self.user_id),
            "request_id": str(self.request_id),
            "duplicates": self.duplicates,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PointerSpec:
        types = {str(t): t for t in (pa.int64(), pa.string())}
        return cls(
            value["name"],
            value["groups"],
            [Trait.from_json(t) for t in value["columns"]],
            request=value["request"],
            target_group=value["target_group"],
            max_length=value["max_length"],
            user_id=types[value["user_id"]],
            request_id=types[value["request_id"]],
            duplicates=value["duplicates"],
        )
