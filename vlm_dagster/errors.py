"""Every error this package raises on purpose. Each class owns its wording and says the way out.

All of them are `VlmError`. Those a user causes with a bad value are `ValueError` too. They survive
pickling, because sealing, loading and training cross process boundaries.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = [
    "CheckpointError",
    "ChecksumError",
    "CorruptFileError",
    "DroppedError",
    "GoneError",
    "InvalidEventsError",
    "InvalidRequestsError",
    "LoaderError",
    "PinError",
    "RetiredVersionError",
    "SchemaError",
    "SourceFormatError",
    "StorageError",
    "TableError",
    "TrainingError",
    "VlmError",
    "WatermarkError",
    "WindowError",
    "WindowSealedError",
    "WorkerError",
]


def _revive(cls: type[VlmError], message: str, state: dict[str, Any]) -> VlmError:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


class VlmError(Exception):
    """Base of all errors raised on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _revive, (type(self), str(self), dict(self.__dict__))


class SchemaError(VlmError, ValueError):
    """A declared name, type, column or option does not fit. Nothing was read or written."""

    def __init__(self, what: str, way_out: str) -> None:
        super().__init__(f"{what}. {way_out}")


class _InvalidRowsError(VlmError, ValueError):
    noun = "row"

    def __init__(
        self,
        problem: str,
        *,
        row: int | None,
        column: str | None,
        value: object,
        way_out: str,
        where: str = "",
        num_rows: int = 1,
    ) -> None:
        place = f" in {where}" if where else ""
        at = "" if row is None else f"row {row}{place}"
        if row is None and where:
            at = where
        named = f", column {column!r}" if column else ""
        shown = "" if value is None and column is None else f" (value: {value!r})"
        more = f" ({num_rows:,} such rows; this is the first)" if num_rows > 1 else ""
        prefix = f"{self.noun} {at}{named}: " if at else f"{self.noun}s{named}: "
        super().__init__(f"{prefix}{problem}{shown}{more}. {way_out} Nothing was written.")
        self.row = row
        self.column = column
        self.value = value
        self.num_rows = num_rows


class InvalidEventsError(_InvalidRowsError):
    """An event row breaks a rule. `row` counts from 0 over the whole input, in its given order."""

    noun = "event"


class InvalidRequestsError(_InvalidRowsError):
    """A request row breaks a rule. `row` counts from 0 over the whole input, in its given order."""

    noun = "request"


class SourceFormatError(VlmError, ValueError):
    """A source file does not say what its format promises. `line` counts from 1."""

    def __init__(
        self, file: str, problem: str, *, line: int | None, value: object, way_out: str
    ) -> None:
        at = f"{file}, line {line}" if line is not None else file
        shown = "" if value is None else f" (value: {value!r})"
        super().__init__(f"{at}: {problem}{shown}. {way_out}")
        self.file = file
        self.line = line
        self.value = value


class WindowError(VlmError, ValueError):
    """A window key is not on the grid, or lies where the table cannot take it."""

    def __init__(self, key: object, problem: str, way_out: str) -> None:
        super().__init__(f"window {key!r}: {problem}. {way_out}")
        self.key = key


class WindowSealedError(VlmError):
    """A window is already sealed with other content."""

    def __init__(self, *, table: str, window: str, sealed: str, offered: str) -> None:
        super().__init__(
            f"window {window!r} of {table} is sealed with digest {sealed}, but the content offered "
            f"now has digest {offered}. A sealed window never changes, so nothing was written. "
            f"To keep what is sealed, do nothing. To see what it holds, run "
            f"`vlm-dagster inspect {table} --window {window}`. If what is sealed is wrong, correct it "
            f"explicitly (`vlm-dagster correct {table} {window} FILE --reason ...`): that makes a "
            f"new revision, and old pins keep replaying the old one."
        )
        self.table = table
        self.window = window
        self.sealed = sealed
        self.offered = offered


class WatermarkError(VlmError, ValueError):
    """Something lies beyond the last instant up to which the history is known to be complete."""

    def __init__(
        self, *, table: str, version: int, watermark: str, asked: str, missing: Iterable[str] = ()
    ) -> None:
        gaps = list(missing)
        gap = (
            f" Windows not sealed yet: {', '.join(gaps[:5])}{', ...' if len(gaps) > 5 else ''}."
            if gaps
            else ""
        )
        super().__init__(
            f"{asked} lies beyond the watermark {watermark} of {table} at version {version}: the "
            f"history there is not complete yet.{gap} Seal the missing windows (an empty one is "
            f"sealed as empty), then use a newer snapshot."
        )
        self.watermark = watermark


class TableError(VlmError):
    """A table is missing, not ours, newer than this code, or no longer has a version."""

    def __init__(self, uri: str, problem: str, way_out: str) -> None:
        super().__init__(f"{uri}: {problem}. {way_out}")
        self.uri = uri


class PinError(VlmError):
    """What a pin names is not what the table holds now: replaying it would not be exact."""

    def __init__(self, what: str, *, pinned: object, found: object, way_out: str) -> None:
        super().__init__(f"{what}: pinned {pinned}, found {found}. {way_out}")
        self.pinned = pinned
        self.found = found


class DroppedError(PinError):
    """All that a pin shows has been dropped by age, and no version that is kept has it any more."""


class CorruptFileError(VlmError):
    """A data file of a table is missing, cut short, or not what it was when it was sealed."""

    def __init__(self, *, table: str, path: str, version: int | None, problem: str) -> None:
        at = "" if version is None else f" at version {version}"
        super().__init__(
            f"file {path} of {table}{at}: {problem}. Restore the file from a copy (its name is "
            f"the SHA-256 of its bytes, so a copy proves itself), then run `vlm-dagster verify "
            f"{table}`."
        )
        self.path = path


class RetiredVersionError(VlmError):
    """A version that is not kept any more was asked for, or was collected while it was read."""

    def __init__(
        self,
        *,
        table: str,
        version: int,
        by: str,
        at: str,
        way_out: str = "Open the pin again: it opens a version that is kept and holds the same "
        "content, proved by its digest.",
    ) -> None:
        super().__init__(
            f"version {version} of {table} was retired by {by} on {at}, so its files may be gone. "
            f"{way_out}"
        )
        self.version = version


class ChecksumError(VlmError):
    """A rebuilt sequence is not the one its pointer was made for."""

    def __init__(self, *, group: str, user_id: object, end_position: int, num_bad: int) -> None:
        super().__init__(
            f"feature group {group!r}, user {user_id!r}, end position {end_position}: the rebuilt "
            f"sequence does not match the pointer's checksum ({num_bad} such pointers in this "
            f"unit). The history is not the one the pointer was built on: run `vlm-dagster verify` "
            f"on both tables, or rebuild the pointer dataset against the present snapshot."
        )
        self.group = group
        self.user_id = user_id


class GoneError(VlmError):
    """Examples point at events that were erased, or dropped by age."""

    def __init__(self, *, group: str, user_id: object, end_position: int, num_gone: int) -> None:
        super().__init__(
            f"{num_gone:,} examples point at events of feature group {group!r} that were erased, or "
            f"dropped by age; the first is of user {user_id!r}, end position {end_position}. A "
            f"history is never shortened silently: pass gone='drop' to leave such examples out, "
            f"counted, or build the pointers anew."
        )
        self.group = group
        self.user_id = user_id
        self.end_position = end_position
        self.num_gone = num_gone


class StorageError(VlmError, OSError):
    """Storage refused a read or a write."""

    def __init__(self, uri: str, doing: str, cause: BaseException, *, writing: bool = True) -> None:
        detail = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
        way_out = (
            "Nothing was committed. Free space or repair access, then run the same command again; "
            "left-over files are swept."
            if writing
            else "Repair access, then run the same command again."
        )
        super().__init__(f"{uri}: storage failed while {doing}: {detail}. {way_out}")
        self.uri = uri


class LoaderError(VlmError):
    """A loader cannot go on, for a reason that lies neither in its data nor in its options."""

    def __init__(self, problem: str, way_out: str) -> None:
        super().__init__(f"{problem}. {way_out}")


class WorkerError(LoaderError):
    """A process that reads for a loader died, or cannot be asked any more. `exit_code` as
    `subprocess` gives it: negative for a signal; None if it did not die."""

    def __init__(self, problem: str, way_out: str, *, exit_code: int | None = None) -> None:
        super().__init__(problem, way_out)
        self.exit_code = exit_code


class CheckpointError(VlmError):
    """A training checkpoint is missing, damaged, or written by newer code."""

    def __init__(self, path: str, problem: str, way_out: str) -> None:
        super().__init__(f"checkpoint {path}: {problem}. {way_out}")
        self.path = path


class TrainingError(VlmError):
    """Training cannot go on. `step` counts optimizer steps from 1; None before the first."""

    def __init__(self, problem: str, way_out: str, *, step: int | None = None) -> None:
        at = "" if step is None else f"step {step}: "
        super().__init__(f"{at}{problem}. {way_out}")
        self.step = step
