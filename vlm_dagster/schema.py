"""What is declared about data: frozen values that validate themselves where they are made."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from vlm_dagster.encodings import check_encoding
from vlm_dagster.errors import SchemaError

__all__ = ["FeatureGroup", "Projection", "Trait", "check_name"]

RESERVED = frozenset(
    {"user_id", "event_id", "event_time", "available_at", "segment", "bucket", "position"}
)
TIME_TYPE = pa.timestamp("us", "UTC")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
_TRAIT_TYPES: dict[str, pa.DataType] = {
    str(t): t
    for t in (
        pa.bool_(),
        pa.int8(),
        pa.int16(),
        pa.int32(),
        pa.int64(),
        pa.float32(),
        pa.float64(),
        pa.string(),
        TIME_TYPE,
    )
}
_ID_TYPES: dict[str, pa.DataType] = {str(t): t for t in (pa.int64(), pa.string())}


def check_name(name: object, what: str) -> str:
    """A name that is safe as a column, a path part and an SQL identifier, or SchemaError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SchemaError(
            f"{what} {name!r} is not a valid name",
            "Use a lower-case letter, then up to 62 lower-case letters, digits or underscores.",
        )
    return name


@dataclass(frozen=True)
class Trait:
    """One column of an event.

    Attributes:
        name: the column's name.
        type: bool, int8-int64, float32, float64, string or timestamp("us", "UTC").
        missing: what a null in the source becomes when it is sealed. None (the default) refuses
            nulls. Stored columns never hold nulls, so that a sequence is one dense tensor.
        encoding: how its values are stored: "delta", "dictionary", "byte_stream_split" or
            "plain". None (the default) chooses by type. It changes the size, never the values.
    """

    name: str
    type: pa.DataType
    missing: bool | int | float | str | None = None
    encoding: str | None = None

    def __post_init__(self) -> None:
        check_name(self.name, "trait name")
        if self.name in RESERVED:
            raise SchemaError(
                f"trait name {self.name!r} is reserved",
                f"Every event has it already, or the table needs it; reserved names are "
                f"{', '.join(sorted(RESERVED))}.",
            )
        if str(self.type) not in _TRAIT_TYPES:
            raise SchemaError(
                f"trait {self.name!r} has type {self.type}, which cannot be stored",
                f"Use one of {', '.join(_TRAIT_TYPES)}.",
            )
        if self.missing is not None:
            way_out = (
                "Give a value of the trait's own type (for a time: UTC microseconds since 1970)."
            )
            what = f"trait {self.name!r}: missing={self.missing!r} is not a {self.type}"
            if type(self.missing) not in (bool, int, float, str):
                raise SchemaError(f"{what}, but a {type(self.missing).__name__}", way_out)
            if isinstance(self.missing, float) and not pa.types.is_floating(self.type):
                raise SchemaError(what, way_out)  # Arrow would cut its fraction off
            try:
                pa.scalar(self.missing, self.type)
            except (
                pa.ArrowInvalid,
                pa.ArrowTypeError,
                pa.ArrowNotImplementedError,
                OverflowError,
            ) as error:
                raise SchemaError(f"{what} ({error})", way_out) from None
        if self.encoding is not None:
            check_encoding(self.name, self.encoding, self.type)

    def to_json(self) -> dict[str, Any]:
        missing: Any = self.missing
        if isinstance(missing, float) and not math.isfinite(missing):
            missing = {"float": str(missing)}  # JSON has no NaN
        found = {"name": self.name, "type": str(self.type), "missing": missing}
        return found if self.encoding is None else {**found, "encoding": self.encoding}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Trait:
        missing = value["missing"]
        if isinstance(missing, dict):
            missing = float(missing["float"])
        return cls(value["name"], _TRAIT_TYPES[value["type"]], missing, value.get("encoding"))


@dataclass(frozen=True)
class FeatureGroup:
    """A kind of event with its own traits; stored in one Delta table.

    Attributes:
        name: the group's name.
        traits: the columns beside `user_id`, `event_id`, `event_time` and `available_at`.
        user_id: int64 or string.
        event_id: int64 or string; unique within a user. It breaks ties of `available_at`.
        availability: "recorded" if events carry `available_at`, the instant from which the
            platform could have served them; "event_time" if the source has no such column, so
            that `event_time` stands for both and a late event for a sealed window is refused.
        duplicates: what happens to a second event with the same (user_id, event_id) in one
            window: "refuse" it with an error, or keep the "first" in input order and count.
    """

    name: str
    traits: tuple[Trait, ...] = ()
    user_id: pa.DataType = field(default_factory=pa.int64)
    event_id: pa.DataType = field(default_factory=pa.int64)
    availability: Literal["recorded", "event_time"] = "event_time"
    duplicates: Literal["refuse", "first"] = "refuse"

    def __init__(
        self,
        name: str,
        traits: Sequence[Trait] = (),
        *,
        user_id: pa.DataType | None = None,
        event_id: pa.DataType | None = None,
        availability: Literal["recorded", "event_time"] = "event_time",
        duplicates: Literal["refuse", "first"] = "refuse",
    ) -> None:
        object.__setattr__(self, "name", check_name(name, "feature group name"))
        object.__setattr__(self, "traits", tuple(traits))
        object.__setattr__(self, "user_id", user_id or pa.int64())
        object.__setattr__(self, "event_id", event_id or pa.int64())
        object.__setattr__(self, "availability", availability)
        object.__setattr__(self, "duplicates", duplicates)
        self._validate()

    def _validate(self) -> None:
        names = [trait.name for trait in self.traits]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise SchemaError(
                f"feature group {self.name!r} names trait {twice[0]!r} twice", "Drop one of them."
            )
        for what, kind in (("user_id", self.user_id), ("event_id", self.event_id)):
            if str(kind) not in _ID_TYPES:
                raise SchemaError(
                    f"feature group {self.name!r} has {what} type {kind}",
                    "Use int64 or string.",
                )
        if self.availability not in ("recorded", "event_time"):
            raise SchemaError(
                f"feature group {self.name!r} has availability {self.availability!r}",
                "Use 'recorded' or 'event_time'.",
            )
        if self.duplicates not in ("refuse", "first"):
            raise SchemaError(
                f"feature group {self.name!r} has duplicates {self.duplicates!r}",
                "Use 'refuse' or 'first'.",
            )

    @property
    def clock(self) -> str:
        """The column that says when an event became available."""
        return "available_at" if self.availability == "recorded" else "event_time"

    @property
    def aliases(self) -> dict[str, str]:
        """Columns of an event that are not stored, and the stored ones that they equal."""
        return {} if self.availability == "recorded" else {"available_at": "event_time"}

    @property
    def stored_schema(self) -> pa.Schema:
        """`event_schema` without `available_at` where that would repeat `event_time`."""
        schema = self.event_schema
        at = schema.get_field_index("available_at")
        return schema if self.availability == "recorded" else schema.remove(at)

    @property
    def event_schema(self) -> pa.Schema:
        """The columns of one event, in order, without the partition columns."""
        return pa.schema(
            [
                pa.field("user_id", self.user_id, nullable=False),
                pa.field("event_id", self.event_id, nullable=False),
                pa.field("event_time", TIME_TYPE, nullable=False),
                pa.field("available_at", TIME_TYPE, nullable=False),
                *(pa.field(t.name, t.type, nullable=False) for t in self.traits),
            ]
        )

    def trait(self, name: str) -> Trait:
        """The trait of that name, or SchemaError."""
        for trait in self.traits:
            if trait.name == name:
                return trait
        raise SchemaError(
            f"feature group {self.name!r} has no trait {name!r}",
            f"It has {', '.join(t.name for t in self.traits) or 'none'}.",
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "traits": [t.to_json() for t in self.traits],
            "user_id": str(self.user_id),
            "event_id": str(self.event_id),
            "availability": self.availability,
            "duplicates": self.duplicates,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> FeatureGroup:
        return cls(
            value["name"],
            [Trait.from_json(t) for t in value["traits"]],
            user_id=_ID_TYPES[value["user_id"]],
            event_id=_ID_TYPES[value["event_id"]],
            availability=value["availability"],
            duplicates=value["duplicates"],
        )


@dataclass(frozen=True)
class Projection:
    """What one model (a tenant) reads of a feature group.

    Attributes:
        traits: columns to read, in order; `event_id`, `event_time` and `available_at` may be
            named too. None reads every trait.
        max_length: the newest so many events of a history; None reads all. Sequences are oldest
            first, and truncation keeps the newest.
    """

    traits: tuple[str, ...] | None = None
    max_length: int | None = None

    def __init__(self, traits: Sequence[str] | None = None, max_length: int | None = None) -> None:
        if isinstance(traits, str):
            raise SchemaError(f"traits={traits!r} is one string", f"Write traits=[{traits!r}].")
        chosen = None if traits is None else tuple(traits)
        if chosen is not None and len(set(chosen)) != len(chosen):
            raise SchemaError(f"projection names a trait twice: {list(chosen)}", "Drop one.")
        if max_length is not None and (
            isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 0
        ):
            raise SchemaError(
                f"max_length={max_length!r} is not a number of events",
                "Use an integer of 0 or more, or None for the whole history.",
            )
        object.__setattr__(self, "traits", chosen)
        object.__setattr__(self, "max_length", max_length)

    def columns(self, group: FeatureGroup) -> list[str]:
        """The columns to read from `group`, in order, or SchemaError for an unknown one."""
        if self.traits is None:
            return [t.name for t in group.traits]
        for name in self.traits:
            if name not in ("event_id", "event_time", "available_at"):
                group.trait(name)
        return list(self.traits)

    def to_json(self) -> dict[str, Any]:
        traits = None if self.traits is None else list(self.traits)
        return {"traits": traits, "max_length": self.max_length}
