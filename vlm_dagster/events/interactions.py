"""The events of one chunk of made-up users on one day, as whole columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vlm_dagster.events.generator_config import GeneratorConfig
from vlm_dagster.events.people import (
    F64,
    I64,
    U64,
    exponential,
    hashed,
    log_uniform,
    lognormal,
    normal,
    sixteen,
    words,
    zipf,
)

__all__ = ["Interactions"]

_EVENTS_A_CHUNK = 131_072  # expected on one day; a chunk is what is held in memory
_DAY_US = 86_400_000_000
_SECOND_US = 1_000_000
_ONE = 1 << 16

# Sessions: mean length 8 as 1 + floor(exponential * scale), whose mean is 1 + 1/(e^(1/scale) - 1).
_MEAN_LENGTH = 8.0
_LENGTH_SCALE = 7.488757
_WEEKDAY, _WEEKEND = 0.93, 1.175  # 5 and 2 of them average to 1
_ACTIVITY_SIGMA = 1.1  # of a user's mean activity: the busiest 1 % have 10 times the median
_DAILY_SIGMA = 0.5  # of one user's days

# Which interest a session is about (out of 65,536), and how long each lasts in drift_days.
_SLOT_ENDS = np.array([26_214, 43_909, 58_982])  # fast 40 %, medium 27 %, slow 23 %, else curious
_SLOT_LIVES = np.array([0.25, 1.0, 4.0, 1.0])
_SLOT_MATCH = np.array([3, 2, 2, 0])
_CURIOUS = 3

# What an event does (out of 65,536): follow the chain, return to a favourite, take what is
# popular, or look at another topic.
_FOLLOW, _FAVOURITE, _POPULAR = 29_491, 49_152, 62_259
_NUM_FAVOURITES = 12

# P(more than a view) by match, 0 to 11: 1 / (1 + exp(-0.8 * (match - 7.5))), out of 65,536.
_POSITIVE = np.array(
    [162, 359, 795, 1743, 3755, 7811, 15_135, 26_300, 39_236, 50_401, 57_725, 61_781]
)
_SHARE_OF_POSITIVE, _BUY_OF_POSITIVE = 0.30, 0.10

_SALTS = {"phase": 1, "generosity": 2, "activity": 3, "slot": 4, "topic": 5, "favourite": 6}


class Interactions:
    """Made-up people: their fixed properties, and what they do on a day.

    Attributes:
        num_chunks: into how many chunks the users are cut; the same on every day.
        expected_per_day: events of all users on an average day.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        self._config = config
        self._rates = _rates(config)
        total = np.cumsum(self._rates)
        self.expected_per_day = float(total[-1])
        chunk_of = (total / _EVENTS_A_CHUNK).astype(np.int64)
        self._starts = np.append(
            np.flatnonzero(np.diff(chunk_of, prepend=-1)), config.num_users
        ).astype(np.int64)
        self.num_chunks = len(self._starts) - 1
        topics = np.arange(config.num_topics + 1, dtype=np.int64)
        self._topic_start = topics * config.num_items // config.num_topics
        # Ids are shuffled, so that neither topic nor popularity shows in them.
        order = hashed(config.seed, 7, np.arange(config.num_items))
        self._item_id = np.empty(config.num_items, np.int64)
        self._item_id[np.argsort(order, kind="stable")] = np.arange(1, config.num_items + 1)
        self._quality = (order & np.uint64(3)).astype(np.int8)
        num_authors = max(config.num_items // 20, config.num_topics)
        self._author_id = np.repeat(topics[:-1], np.diff(self._topic_start))
        per_topic = num_authors // config.num_topics
        author = (order >> np.uint64(8)).astype(np.int64) & 0xFFFFFF
        self._author_id = self._author_id * per_topic + author % per_topic + 1

    def events(self, day: int, chunk: int) -> list[npt.NDArray[Any]]:
        """What the users of a chunk do in sessions that begin on this day, user by user.

        Returns the columns of the group's input schema in order, times as int64 UTC
        microseconds: [N] each.
        """
        config = self._config
        first, last = int(self._starts[chunk]), int(self._starts[chunk + 1])
        users = np.arange(first, last, dtype=np.int64)
        user, draws = self._sessions(users, day, chunk)
        start_us = config.start_us + day * _DAY_US + self._start_of_day_us(user, draws)
        order = np.lexsort((start_us, user))
        user, start_us, draws = user[order], start_us[order], draws[:, order]

        length = 1 + (exponential(sixteen(draws[0], 2)) * _LENGTH_SCALE).astype(np.int64)
        slot, topic = self._interest(user, day, draws)
        begins = np.cumsum(length) - length
        num_events = int(length.sum())
        session = np.repeat(np.arange(len(user)), length)
        raw = words(config.seed, day, chunk, 2 * num_events, stream=1).reshape(2, num_events)

        index, topic_of_event, match = self._items(raw[0], session, begins, user, slot, topic)
        of_user = user[session]
        generosity = (hashed(config.seed, _SALTS["generosity"], users) & np.uint64(3)).astype(
            np.int64
        )
        match += self._quality[index]
        match += generosity[of_user - first]
        action = _actions(sixteen(raw[1], 0), match)
        dwell = np.rint(lognormal(sixteen(raw[1], 1), 0.9) * (7_000.0 + 3_500.0 * match))  # ms

        pause = (exponential(sixteen(raw[1], 2)) * (6.0 * _SECOND_US)).astype(np.int64)
        ends = np.cumsum(dwell.astype(np.int64) * 1_000 + pause)
        since = (
            ends - (ends[begins] - dwell[begins].astype(np.int64) * 1_000 - pause[begins])[session]
        )
        took = dwell.astype(np.int64) * 1_000 + pause
        event_time = start_us[session] + since - took
        available = self._available(event_time, raw[1], session, begins, length, draws)

        ordinal = np.arange(num_events) - self._first_of_user(of_user)
        assert num_events == 0 or int(ordinal.max()) < 1 << 18
        event_id = (np.int64(day) << 49) | (ordinal << 31) | of_user
        return [
            of_user + 1,
            event_id,
            event_time,
            available,
            self._item_id[index],
            self._author_id[index],
            topic_of_event.astype(np.int16),
            action,
            (dwell / 1_000.0).astype(np.float32),
        ]

    @staticmethod
    def _first_of_user(of_user: I64) -> I64:
        starts = np.flatnonzero(np.diff(of_user, prepend=-1))
        lengths = np.diff(np.append(starts, len(of_user)))
        return np.repeat(starts, lengths)

    def _sessions(self, users: I64, day: int, chunk: int) -> tuple[I64, U64]:
        """The user of each session, and its draws [3, sessions]."""
        config = self._config
        raw = words(config.seed, day, chunk, len(users), stream=0)
        weekday = (config.start_us // _DAY_US + day + 3) % 7  # 1970-01-01 was a Thursday
        busy = lognormal(sixteen(raw, 0), _DAILY_SIGMA) * (_WEEKEND if weekday >= 5 else _WEEKDAY)
        expected = self._rates[users] * busy * (1.0 / _MEAN_LENGTH)
        num = (expected + sixteen(raw, 1) * (1.0 / _ONE)).astype(np.int64)
        user = np.repeat(users, num)
        draws = words(config.seed, day, chunk, 3 * len(user), stream=2).reshape(3, len(user))
        return user, draws

    def _start_of_day_us(self, user: I64, draws: U64) -> I64:
        """When sessions begin: around the user's own hour, mostly in the evening."""
        phase = sixteen(hashed(self._config.seed, _SALTS["phase"], user), 0)
        hours = 19.5 + 2.0 * normal(phase) + 3.0 * normal(sixteen(draws[0], 0))
        any_hour = (draws[0] >> np.uint64(48)) < np.uint64(9_830)  # 15 %
        hours = np.where(any_hour, sixteen(draws[0], 1) * (24.0 / _ONE), hours)
        return (hours * 3_600 * _SECOND_US).astype(np.int64) % _DAY_US

    def _interest(self, user: I64, day: int, draws: U64) -> tuple[I64, I64]:
        """Which interest each session is about, and which topic that is on this day."""
        config = self._config
        slot = np.searchsorted(_SLOT_ENDS, sixteen(draws[1], 0), side="right")
        life = _SLOT_LIVES[slot] * config.drift_days
        shift = sixteen(hashed(config.seed, _SALTS["slot"], user, slot), 0) * (1.0 / _ONE)
        epoch = (day / life + shift).astype(np.int64)
        taste = hashed(config.seed, _SALTS["topic"], user, slot, epoch)
        raw = np.where(slot == _CURIOUS, draws[1] >> np.uint64(16), taste)
        return slot, zipf(raw, config.num_topics)

    def _items(
        self, raw: U64, session: I64, begins: I64, user: I64, slot: I64, topic: I64
    ) -> tuple[I64, I64, I64]:
        """Item index, topic and match (without quality and generosity) of each event."""
        config = self._config
        kind = sixteen(raw, 0)
        is_start = kind >= _FOLLOW
        is_start[begins] = True
        starts = np.flatnonzero(is_start)
        run = np.cumsum(is_start) - 1
        of_session = session[starts]
        draw = raw[starts] >> np.uint64(16)
        # A session's first event never follows; its draw is spread over the other three kinds.
        what = kind[starts].astype(np.int64)
        what = np.where(what < _FOLLOW, _FOLLOW + what * (_ONE - _FOLLOW) // _FOLLOW, what)

        run_topic = topic[of_session].copy()
        run_match = _SLOT_MATCH[slot[of_session]]
        other = what >= _POPULAR
        run_topic[other] = zipf(draw[other] >> np.uint64(16), config.num_topics)
        run_match[other] = 0
        low = self._topic_start[run_topic]
        size = self._topic_start[run_topic + 1] - low

        rank = self._ranks(draw, size)
        favourite = np.flatnonzero(what < _FAVOURITE)
        number = zipf(draw[favourite], _NUM_FAVOURITES)
        who = user[of_session[favourite]]
        fixed = hashed(config.seed, _SALTS["favourite"], who, run_topic[favourite], number)
        rank[favourite] = (fixed >> np.uint64(1)).astype(np.int64) % size[favourite]
        run_match[favourite] += 2

        steps = np.arange(len(raw)) - starts[run]
        index = low[run] + (rank[run] + steps) % size[run]
        return index, run_topic[run], run_match[run]

    def _ranks(self, draw: U64, size: I64) -> I64:
        """Zipf ranks in topics whose sizes differ by at most one."""
        smallest = self._config.num_items // self._config.num_topics
        ranks = zipf(draw, smallest)
        larger = np.flatnonzero(size > smallest)
        if len(larger):
            ranks[larger] = zipf(draw[larger], smallest + 1)
        return ranks

    def _available(
        self, event_time: I64, raw: U64, session: I64, begins: I64, length: I64, draws: U64
    ) -> I64:
        """When the platform could have served each event."""
        config = self._config
        soon = (exponential(sixteen(raw, 3)) * (1.5 * _SECOND_US)).astype(np.int64)
        available: I64 = event_time + soon + 200_000
        late = sixteen(draws[2], 0) < config.late_share * _ONE
        if late.any():
            hours: F64 = log_uniform(draws[2] >> np.uint64(16), 24.0 * config.max_late_days)
            end = event_time[begins + length - 1]
            synced = end + (hours * 3_600 * _SECOND_US).astype(np.int64)
            available = np.where(late[session], synced[session], available)
        return available


def _actions(draws: npt.NDArray[np.uint16], match: I64) -> npt.NDArray[np.int8]:
    positive = _POSITIVE[match]
    draw = draws.astype(np.int64)
    action = (draw < positive).astype(np.int8)
    action += draw < positive * _SHARE_OF_POSITIVE
    action += draw < positive * _BUY_OF_POSITIVE
    return action


def _rates(config: GeneratorConfig) -> F64:
    """Expected events a day of each user."""
    users = np.arange(config.num_users, dtype=np.int64)
    draws = sixteen(hashed(config.seed, _SALTS["activity"], users), 0)
    rates = lognormal(draws, _ACTIVITY_SIGMA) * config.events_per_user_day
    longest = config.longest_history / config.num_days
    rates = np.minimum(rates, longest)
    num_heavy = round(config.heavy_user_share * config.num_users)
    if config.heavy_user_share > 0:
        num_heavy = max(num_heavy, 1)
    nth = np.arange(num_heavy, dtype=np.int64)
    heavy = (2 * nth + 1) * config.num_users // (2 * num_heavy) if num_heavy else nth
    rates[heavy] = np.maximum(rates[heavy], longest / np.sqrt(nth + 1.0))
    return rates
