"""How many people to make up, for how long, and how they differ."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

from vlm_dagster.errors import SchemaError
from vlm_dagster.windows import parse_instant

__all__ = ["GeneratorConfig"]

_MOST_EVENTS_A_DAY = 16_000  # of one user; the event id has room for 16 times as many


@dataclass(frozen=True)
class GeneratorConfig:
    """What to make up. The same values give the same bytes, everywhere.

    Attributes:
        num_users: users, with ids 1 to num_users.
        num_items: items, with ids 1 to num_items.
        num_topics: topics, the values of `category` from 0; each has items of its own.
        num_days: windows of one UTC day of availability. What would become available later is
            not part of the data, as in an extract taken at the end of the last day.
        start: the first day, in UTC.
        events_per_user_day: mean over the users who are not heavy.
        heavy_user_share: share of users with very long histories.
        longest_history: about how many events the heaviest user has at the end; the n-th
            heaviest has 1 / sqrt(n) of that.
        late_share: share of sessions that become available hours to days late.
        max_late_days: the most they are late, after the end of the session.
        drift_days: how long the medium interest of a user lasts.
        seed: 0 or more.
    """

    num_users: int = 2_000
    num_items: int = 5_000
    num_topics: int = 25
    num_days: int = 30
    start: str = "2025-01-01"
    events_per_user_day: float = 6.0
    heavy_user_share: float = 0.01
    longest_history: int = 4_000
    late_share: float = 0.03
    max_late_days: int = 2
    drift_days: float = 28.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("num_users", 1, 2**31 - 1),
            ("num_topics", 1, 32_767),
            ("num_items", 1, 2**31 - 1),
            ("num_days", 1, 2**14 - 1),
            ("longest_history", 1, 2**31),
            ("max_late_days", 1, 365),
            ("seed", 0, 2**57),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise SchemaError(
                    f"{name}={value!r} is out of range", f"Use an integer from {low} to {high:,}."
                )
        for name, least, most in (
            ("events_per_user_day", 0.0, 1_000.0),
            ("heavy_user_share", 0.0, 1.0),
            ("late_share", 0.0, 1.0),
            ("drift_days", 0.1, 100_000.0),
        ):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not least <= value <= most
            ):
                raise SchemaError(
                    f"{name}={value!r} is out of range",
                    f"Use a number from {least:g} to {most:g}.",
                )
        if self.num_items < 2 * self.num_topics:
            raise SchemaError(
                f"num_items={self.num_items} is too few for {self.num_topics} topics",
                "Every topic needs two items of its own.",
            )
        if self.longest_history > _MOST_EVENTS_A_DAY * self.num_days:
            raise SchemaError(
                f"longest_history={self.longest_history:,} does not fit into {self.num_days} days",
                f"A user has at most {_MOST_EVENTS_A_DAY:,} events a day; use more days.",
            )
        if self.longest_history < self.events_per_user_day * self.num_days:
            raise SchemaError(
                f"longest_history={self.longest_history:,} is less than what an average user has "
                f"({self.events_per_user_day * self.num_days:,.0f})",
                "Use a larger longest_history, or fewer days or events_per_user_day.",
            )
        try:
            date.fromisoformat(self.start)
            start = parse_instant(self.start) if len(self.start) == 10 else -1
        except (ValueError, TypeError):
            start = -1
        if start < 0:
            raise SchemaError(
                f"start={self.start!r} is not a day since 1970", "Write it like 2025-01-01."
            )

    @property
    def start_us(self) -> int:
        """The first instant, in UTC microseconds since 1970."""
        return parse_instant(self.start)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
