"""Odd histories, for property tests and by hand; and the tables made of them."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
from hypothesis import settings
from hypothesis import strategies as st

from vlm_dagster import FeatureGroup, HistoryStore, Trait, WindowGrid

TIME = pa.timestamp("us", "UTC")
DAY_US = 86_400_000_000
FIRST_DAY = "1997-09-20"
FIRST_US = int(datetime(1997, 9, 20, tzinfo=UTC).timestamp()) * 1_000_000

TRAITS = (
    Trait("item_id", pa.int64()),
    Trait("rating", pa.float32()),
    Trait("title", pa.string()),
    Trait("liked", pa.bool_()),
)
TRAIT_NAMES = tuple(trait.name for trait in TRAITS)


def few(num_examples: int) -> settings:
    """So many examples of an expensive property; more under the thorough profile."""
    return settings(max_examples=num_examples * settings.default.max_examples // 50)


def day(number: int) -> str:
    """The key of a day, counted from the first."""
    return WindowGrid("daily").containing(FIRST_US + number * DAY_US).key


def at(number: int, offset_us: int = 0) -> int:
    """An instant of a day, counted from the first."""
    return FIRST_US + number * DAY_US + offset_us


# -- strategies -----------------------------------------------------------------------------------

integer_ids = st.one_of(
    st.integers(-3, 20), st.integers(-(2**63), 2**63 - 1), st.sampled_from([-(2**63), 2**63 - 1])
)
string_ids = st.one_of(
    st.text(max_size=4),
    st.text(max_size=40),
    st.sampled_from(
        ["", " ", "\x00", "a", "a\x00", "ä", "a\u0308", "\U0001d518", "user-12345678", "'\"/%"]
    ),
)
offsets = st.one_of(
    st.integers(0, 3), st.sampled_from([0, 1, DAY_US - 1]), st.integers(0, DAY_US - 1)
)


@st.composite
def event_lists(
    draw: st.DrawFn,
    user_ids: st.SearchStrategy = integer_ids,
    event_ids: st.SearchStrategy = integer_ids,
    num_days: int = 4,
    max_size: int = 30,
) -> list[dict]:
    """Events of a few users over a few days: none, one, all in one instant, ties, days without."""
    ids = draw(st.lists(event_ids, unique=True, max_size=max_size))
    users = draw(st.lists(user_ids, unique=True, min_size=1, max_size=4))
    days = draw(st.lists(st.integers(0, num_days - 1), min_size=1, max_size=num_days))
    times = offsets
    if draw(st.booleans()):  # all in one instant of their days
        times = st.just(draw(offsets))
    events = []
    for event_id in ids:
        available_at = at(draw(st.sampled_from(days)), draw(times))
        events.append(
            {
                "user_id": draw(st.sampled_from(users)),
                "event_id": event_id,
                "event_time": available_at - draw(st.integers(0, 3 * DAY_US)),
                "available_at": available_at,
                "item_id": draw(integer_ids),
                "rating": draw(st.floats(width=32, allow_nan=False)),
                "title": draw(st.text(max_size=5)),
                "liked": draw(st.booleans()),
            }
        )
    return events


@st.composite
def request_lists(draw: st.DrawFn, events: list[dict], num_days: int = 4) -> list[dict]:
    """Requests at any instant of the days, of users known and unknown, at events' own instants."""
    users = [e["user_id"] for e in events]
    stranger = "nobody" if users and isinstance(users[0], str) else 424242
    moments = [e["available_at"] for e in events] or [at(0)]
    times = st.one_of(
        st.sampled_from(moments),
        st.sampled_from(moments).map(lambda t: min(t + 1, at(num_days) - 1)),
        st.integers(at(0), at(num_days) - 1),
    )
    size = draw(st.integers(0, 12))
    return [
        {
            "user_id": draw(st.sampled_from([*users, stranger])),
            "request_id": number,
            "request_time": draw(times),
        }
        for number in range(size)
    ]


def many_events(seed: int, num_events: int, num_users: int, num_days: int = 4) -> list[dict]:
    """Seeded events with ties, a user who has a third of them, and uneven days.

    Ids do not grow with time, nor with the order in which the events stand here.
    """
    rng = random.Random(seed)
    ids = rng.sample(range(num_events), num_events)
    events = []
    for number in ids:
        user = 0 if rng.random() < 1 / 3 else rng.randrange(num_users)
        number_of_day = min(rng.randrange(num_days), rng.randrange(num_days))
        available_at = at(number_of_day, rng.randrange(200) * 1_000_000)
        events.append(
            {
                "user_id": user,
                "event_id": number,
                "event_time": available_at - rng.randrange(3_600_000_000),
                "available_at": available_at,
                "item_id": rng.randrange(50),
                "rating": float(rng.randrange(1, 6)),
                "title": rng.choice(["", "a", "bb", "ccc", "ü"]),
                "liked": rng.random() < 0.5,
            }
        )
    return events


# -- tables ---------------------------------------------------------------------------------------


def group_of(events: Sequence[dict] = (), **options: object) -> FeatureGroup:
    """A feature group that these events fit into; they carry their own availability."""
    kinds = {
        name: pa.string() if events and isinstance(events[0][name], str) else pa.int64()
        for name in ("user_id", "event_id")
    }
    return FeatureGroup("ratings", TRAITS, availability="recorded", **{**kinds, **options})


def event_table(events: Sequence[dict], group: FeatureGroup | None = None) -> pa.Table:
    """Events as a user would hand them over."""
    schema = (group or group_of(events)).event_schema
    columns = {field.name: [event[field.name] for event in events] for field in schema}
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    return pa.table(arrays, names=schema.names)


def events_of_day(events: Sequence[dict], number: int) -> list[dict]:
    return [e for e in events if at(number) <= e["available_at"] < at(number + 1)]


def seal_days(
    store: HistoryStore, events: Sequence[dict], days: Sequence[int] = range(4)
) -> HistoryStore:
    """Seal these days, in this order, empty ones as empty."""
    for number in days:
        store.seal(day(number), event_table(events_of_day(events, number), store.group))
    return store


# So narrow that even a handful of events lie in several of them.
BANDS = (1, 3, 8)


def history_of(
    uri: str | Path,
    events: Sequence[dict],
    *,
    days: Sequence[int] = range(4),
    num_buckets: int = 2,
    group: FeatureGroup | None = None,
) -> HistoryStore:
    """A new history table with all of these events in it."""
    store = HistoryStore.create(
        os.fspath(uri), group or group_of(events), num_buckets, start=FIRST_DAY, bands=BANDS
    )
    return seal_days(store, events, days)


def request_table(
    requests: Sequence[dict], user_id: pa.DataType, names: Sequence[str], request_id: pa.DataType
) -> pa.Table:
    """Requests as a user would hand them over."""
    kinds = {"user_id": user_id, "request_time": TIME}
    return pa.table(
        {name: pa.array([r[name] for r in requests], kinds.get(name, request_id)) for name in names}
    )


def files_below(folder: str | Path) -> set[str]:
    """Every file below a folder, by relative path."""
    root = Path(folder)
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
