"""From the columns of somebody's Parquet or CSV file to those of a feature group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc

from vlm_dagster.errors import SchemaError, SourceFormatError
from vlm_dagster.events.lines import time_in_us
from vlm_dagster.events.source import CheckedRows, content_ids, input_schema
from vlm_dagster.schema import TIME_TYPE, FeatureGroup, Trait
from vlm_dagster.windows import format_us

__all__ = ["ColumnMapping", "TimeUnit"]

TimeUnit = Literal["s", "ms", "us"]
_OURS = ("user_id", "event_id", "event_time", "available_at")
_TIMES = ("event_time", "available_at")
_WIDER = {
    "uint8": pa.int16(),
    "uint16": pa.int32(),
    "uint32": pa.int64(),
    "halffloat": pa.float32(),
}
_IN_US = {"s": 1_000_000, "ms": 1_000, "us": 1}


@dataclass(frozen=True)
class ColumnMapping:
    """Which column of a file is what.

    Attributes:
        names: (our name, the file's column) pairs. Ours are `user_id`, `event_id`, `event_time`,
            `available_at` and names of traits. A column that is not mentioned keeps its name.
        traits: the traits to read, by our names; None takes every column that is left over.
        types: (our name, type) pairs, where the file's own type (for CSV: the type guessed from
            its first lines) is not the one wanted.
        time_unit: what a numeric time column counts since 1970. It is never guessed.
        assume_utc: whether timestamps without a time zone are UTC. Without it they are refused.
        group: name of the feature group.
        duplicates: see `FeatureGroup`. None means "refuse" where the file has event ids, and
            "first" where they are made from the content, so that exact repeats count once.
    """

    names: tuple[tuple[str, str], ...] = ()
    traits: tuple[str, ...] | None = None
    types: tuple[tuple[str, pa.DataType], ...] = ()
    time_unit: TimeUnit | None = None
    assume_utc: bool = False
    group: str = "events"
    duplicates: Literal["refuse", "first"] | None = None

    def __init__(
        self,
        names: Mapping[str, str] | None = None,
        *,
        traits: Sequence[str] | None = None,
        types: Mapping[str, pa.DataType] | None = None,
        time_unit: TimeUnit | None = None,
        assume_utc: bool = False,
        group: str = "events",
        duplicates: Literal["refuse", "first"] | None = None,
    ) -> None:
        if isinstance(traits, str):
            raise SchemaError(f"traits={traits!r} is one string", f"Write traits=[{traits!r}].")
        if time_unit is not None and time_unit not in get_args(TimeUnit):
            raise SchemaError(f"time_unit={time_unit!r} is unknown", "Use 's', 'ms' or 'us'.")
        object.__setattr__(self, "names", tuple((names or {}).items()))
        object.__setattr__(self, "traits", None if traits is None else tuple(traits))
        object.__setattr__(self, "types", tuple((types or {}).items()))
        object.__setattr__(self, "time_unit", time_unit)
        object.__setattr__(self, "assume_utc", assume_utc)
        object.__setattr__(self, "group", group)
        object.__setattr__(self, "duplicates", duplicates)

    def to_json(self) -> dict[str, Any]:
        return {
            "names": dict(self.names),
            "traits": None if self.traits is None else list(self.traits),
            "types": {name: str(kind) for name, kind in self.types},
            "time_unit": self.time_unit,
            "assume_utc": self.assume_utc,
            "group": self.group,
            "duplicates": self.duplicates,
        }

    def resolve(self, path: str, schema: pa.Schema) -> tuple[FeatureGroup, dict[str, str]]:
        """The feature group of a file with this schema, and the file's column for each of ours.

        Raises:
            SourceFormatError: a column is missing, or its type cannot be used.
            SchemaError: a name or an option does not fit.
        """
        columns = self._columns(path, schema)
        types = dict(self.types)
        for ours in _TIMES:
            if ours in columns:
                self._check_time(path, columns[ours], schema.field(columns[ours]).type)
        traits = [
            Trait(name, types.get(name) or self._trait_type(path, name, schema.field(column)))
            for name, column in columns.items()
            if name not in _OURS
        ]
        has_ids = "event_id" in columns
        group = FeatureGroup(
            self.group,
            traits,
            user_id=self._id_type(path, "user_id", schema.field(columns["user_id"])),
            event_id=self._id_type(path, "event_id", schema.field(columns["event_id"]))
            if has_ids
            else pa.int64(),
            availability="recorded" if "available_at" in columns else "event_time",
            duplicates=self.duplicates or ("refuse" if has_ids else "first"),
        )
        return group, columns

    def _columns(self, path: str, schema: pa.Schema) -> dict[str, str]:
        named = dict(self.names)
        taken = set(named.values())
        for ours in _OURS:
            if ours not in named and ours in schema.names and ours not in taken:
                named[ours] = ours
        for ours, column in named.items():
            if schema.names.count(column) != 1:
                raise _column_error(
                    path, f"has no column {column!r} (mapped to {ours!r})"
                    if column not in schema.names else f"has two columns {column!r}",
                    f"Its columns are {', '.join(schema.names)}.",
                )  # fmt: skip
        for ours in ("user_id", "event_time"):
            if ours not in named:
                raise _column_error(
                    path, f"has no column {ours!r}, and none is mapped to it",
                    f"Say which one it is, e.g. mapping={{{ours!r}: {schema.names[0]!r}}}. "
                    f"Its columns are {', '.join(schema.names)}.",
                )  # fmt: skip
        wanted = self.traits
        if wanted is None:
            used = set(named.values())
            left = [name for name in schema.names if name not in used]
            wanted = (*(name for name in named if name not in _OURS), *left)
        chosen = {ours: named[ours] for ours in _OURS if ours in named}
        for name in wanted:
            column = named.get(name, name)
            if column not in schema.names:
                raise _column_error(
                    path, f"has no column {column!r} for trait {name!r}",
                    f"Its columns are {', '.join(schema.names)}.",
                )  # fmt: skip
            try:
                Trait(name, pa.int64())
            except SchemaError as error:
                raise _column_error(
                    path, f"has a column {column!r}, which cannot be a trait's name ({error})",
                    f"Give it one, e.g. mapping={{'my_trait': {column!r}}}, or list the traits "
                    "to read without it.",
                ) from None  # fmt: skip
            chosen[name] = column
        return chosen

    def _id_type(self, path: str, ours: str, field: pa.Field) -> pa.DataType:
        kind = dict(self.types).get(ours) or _plain(field.type)
        if pa.types.is_integer(kind) and kind != pa.uint64():
            return pa.int64()
        if pa.types.is_string(kind):
            return pa.string()
        raise _column_error(
            path, f"column {field.name!r} has type {field.type}, which cannot be the {ours}",
            "Ids are integers of up to 64 bits with sign, or strings; convert the column.",
        )  # fmt: skip

    def _trait_type(self, path: str, name: str, field: pa.Field) -> pa.DataType:
        kind = _plain(field.type)
        if pa.types.is_timestamp(kind) and (kind.tz is not None or self.assume_utc):
            return TIME_TYPE
        try:
            return Trait(name, kind).type
        except SchemaError as error:
            zone = " A timestamp without a zone needs assume_utc=True." if (
                pa.types.is_timestamp(kind)) else ""  # fmt: skip
            raise _column_error(
                path, f"column {field.name!r} cannot be a trait: {error}",
                f"Convert it, give its type (types={{{name!r}: ...}}), or list the traits to read "
                f"without it.{zone}",
            ) from None  # fmt: skip

    def _check_time(self, path: str, column: str, kind: pa.DataType) -> None:
        if pa.types.is_timestamp(kind):
            if kind.tz is None and not self.assume_utc:
                raise _column_error(
                    path, f"column {column!r} has timestamps without a time zone",
                    "If they are UTC, say so with assume_utc=True; otherwise write them with "
                    "their zone.",
                )  # fmt: skip
        elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind)) or kind == pa.uint64():
            raise _column_error(
                path, f"column {column!r} has type {kind}, which is not an instant",
                "Times are timestamps (in text: ISO 8601 with a zone, 2025-01-01T00:00:00Z) or "
                "numbers with a declared time_unit.",
            )  # fmt: skip

    def check_unit(self, rows: CheckedRows, columns: Mapping[str, str]) -> None:
        """SourceFormatError if a numeric time has no declared unit; shows what it would mean."""
        for ours in _TIMES:
            if ours not in columns or self.time_unit is not None:
                continue
            times = rows.batch.column(columns[ours])
            if pa.types.is_timestamp(times.type):
                continue
            first = next((t for t in times.to_pylist() if t is not None), None)
            meanings = ", ".join(
                f"{format_us(round(first * factor))} if {unit}"
                for unit, factor in _IN_US.items()
                if first is not None and abs(first) < 1e18
            )
            raise SourceFormatError(
                rows.path, f"column {columns[ours]!r} counts time in a unit that is not declared"
                + (f": its first value would be {meanings}" if meanings else ""),
                line=None, value=first, way_out="Pass time_unit='s', 'ms' or 'us'.",
            )  # fmt: skip

    def convert(
        self, rows: CheckedRows, group: FeatureGroup, columns: Mapping[str, str]
    ) -> pa.RecordBatch:
        """These rows as events of `group`; nulls stay nulls.

        Raises:
            SourceFormatError: a value does not fit its type or is not a time.
        """
        made: dict[str, pa.Array] = {}
        for field in input_schema(group):
            if field.name in columns:
                column = columns[field.name]
                made[field.name] = (
                    self._instants(rows, column)
                    if field.name in _TIMES
                    else _cast(rows, column, field.type)
                )
        if "event_id" not in columns:
            made["event_id"] = content_ids(list(made.values()))
        schema = input_schema(group)
        return pa.record_batch([made[name] for name in schema.names], schema=schema)

    def _instants(self, rows: CheckedRows, column: str) -> pa.Array:
        times = rows.batch.column(column)
        if not pa.types.is_timestamp(times.type):
            assert self.time_unit is not None, "check_unit was not called"
            return time_in_us(rows, column, self.time_unit)
        if times.type.tz is None:
            times = times.cast(pa.timestamp(times.type.unit)).cast(TIME_TYPE, safe=False)
        else:
            times = times.cast(TIME_TYPE, safe=False)  # nanoseconds are cut to microseconds
        rows.refuse_where(
            pc.less(times.cast(pa.int64()), 0), column,
            "lies before 1970", "Times before 1970 are not supported.",
        )  # fmt: skip
        return times


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type to store for a type that differs only in how Arrow lays it out."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    return _WIDER.get(str(kind), kind)


def _cast(rows: CheckedRows, column: str, kind: pa.DataType) -> pa.Array:
    values = rows.batch.column(column)
    if values.type == kind:
        return values
    try:
        # Only timestamps may lose something: what is finer than a microsecond.
        return values.cast(kind, safe=not pa.types.is_timestamp(kind))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        for row, value in enumerate(values):
            try:
                pa.array([value.as_py()], values.type).cast(kind)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                bad = pa.array([at == row for at in range(len(values))])
                rows.refuse_where(
                    bad, column, f"does not fit {kind}", "Declare a wider type, or repair it."
                )
        raise _column_error(
            rows.path, f"column {column!r} of type {values.type} cannot become {kind} ({error})",
            "Declare another type, or convert the column.",
        ) from None  # fmt: skip


def _column_error(path: str, problem: str, way_out: str) -> SourceFormatError:
    return SourceFormatError(path, problem, line=None, value=None, way_out=way_out)
