"""The grid of windows: which slice of time one partition of a table is.

A window is a half-open span `[start_us, end_us)` of UTC microseconds since 1970. Keys are spelled
as Dagster spells its partition keys, so one string names the partition and the window.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, get_args

from vlm_dagster.errors import SchemaError, WindowError

__all__ = ["Cadence", "Window", "WindowGrid", "format_us", "parse_instant"]

Cadence = Literal["hourly", "daily", "weekly"]

_HOUR_US = 3_600_000_000
_LENGTH_US = {"hourly": _HOUR_US, "daily": 24 * _HOUR_US, "weekly": 7 * 24 * _HOUR_US}
# 1970-01-04 was a Sunday, the day on which Dagster's weekly partitions begin.
_OFFSET_US = {"hourly": 0, "daily": 0, "weekly": 3 * 24 * _HOUR_US}
_FORMAT = {"hourly": "%Y-%m-%d-%H:%M", "daily": "%Y-%m-%d", "weekly": "%Y-%m-%d"}
_SHAPE = {
    "hourly": re.compile(r"\d{4}-\d{2}-\d{2}-\d{2}:\d{2}"),
    "daily": re.compile(r"\d{4}-\d{2}-\d{2}"),
    "weekly": re.compile(r"\d{4}-\d{2}-\d{2}"),
}


def format_us(time_us: int) -> str:
    """UTC microseconds since 1970 as ISO 8601, e.g. `1997-09-20T00:00:00Z`."""
    seconds, micros = divmod(int(time_us), 1_000_000)
    try:
        text = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return f"{time_us} us"
    return f"{text}.{micros:06d}Z" if micros else f"{text}Z"


def parse_instant(text: str) -> int:
    """ISO 8601 with an offset, or a plain UTC date, as UTC microseconds since 1970."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        if len(text) > 10:
            raise SchemaError(
                f"instant {text!r} has no time zone",
                "Write it with one, e.g. 1997-09-20T00:00:00Z.",
            )
        moment = moment.replace(tzinfo=UTC)
    delta = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


@dataclass(frozen=True, order=True)
class Window:
    """One window. `index` counts windows since 1970; consecutive windows differ by one."""

    index: int
    key: str
    start_us: int
    end_us: int

    @property
    def segment(self) -> str:
        """The key as a Delta partition value: letters, digits, `.`, `_` and `-` only."""
        return self.key.replace(":", "")

    def __str__(self) -> str:
        return self.key


@dataclass(frozen=True)
class WindowGrid:
    """All windows of one cadence, in UTC. Weeks begin on Sunday, as Dagster's do."""

    cadence: Cadence = "daily"

    def __post_init__(self) -> None:
        if self.cadence not in get_args(Cadence):
            raise SchemaError(
                f"window cadence {self.cadence!r} is unknown",
                f"Use one of {', '.join(get_args(Cadence))}.",
            )

    @property
    def length_us(self) -> int:
        return _LENGTH_US[self.cadence]

    def at(self, index: int) -> Window:
        """The window with this index, or WindowError where the calendar ends (year 9999)."""
        start = index * self.length_us + _OFFSET_US[self.cadence]
        try:
            moment = datetime.fromtimestamp(start // 1_000_000, UTC)
        except (OverflowError, ValueError, OSError):
            raise WindowError(
                format_us(start), "lies beyond the calendar", "Check the unit of the time."
            ) from None
        key = moment.strftime(_FORMAT[self.cadence])
        return Window(index, key, start, start + self.length_us)

    def containing(self, time_us: int) -> Window:
        """The window that an instant falls into."""
        return self.at((int(time_us) - _OFFSET_US[self.cadence]) // self.length_us)

    def home_of(self, time_us: int) -> str:
        """What to do with a row of this instant that was offered to another window."""
        try:
            key = self.containing(time_us).key
            self.parse(key)
        except WindowError:
            return "No window can hold it: check its unit and origin"
        return f"It belongs to window {key}: seal it there"

    def parse(self, key: str | Window) -> Window:
        """The window that a key names.

        Raises:
            WindowError: the key is misspelled, or no window of this grid begins there.
        """
        if isinstance(key, Window):
            key = key.key
        if not isinstance(key, str) or not _SHAPE[self.cadence].fullmatch(key):
            raise WindowError(
                key, f"not a {self.cadence} key", f"Spell it like {self._example!r} (UTC)."
            )
        try:
            # Much faster than strptime, and a table has many keys.
            moment = datetime.fromisoformat(f"{key[:10]} {key[11:] or '00:00'}+00:00")
        except ValueError as error:
            raise WindowError(
                key, f"no such date ({error})", f"Spell it like {self._example!r}."
            ) from None
        start = int(moment.timestamp()) * 1_000_000
        if start < 0:
            raise WindowError(key, "lies before 1970", "Times before 1970 are not supported.")
        window = self.containing(start)
        if window.start_us != start:
            raise WindowError(
                key,
                f"no {self.cadence} window begins there",
                f"The window that contains it is {window.key!r}.",
            )
        return window

    @property
    def _example(self) -> str:
        return self.containing(876_700_800_000_000).key

    def between(self, start_us: int, end_us: int) -> list[Window]:
        """All windows that overlap `[start_us, end_us)`, oldest first."""
        if end_us <= start_us:
            return []
        first = self.containing(start_us).index
        last = self.containing(end_us - 1).index
        return [self.at(index) for index in range(first, last + 1)]
