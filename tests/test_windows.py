"""The grid of windows, its keys, and what is said about those that are not on it."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_dagster import Window, WindowGrid
from vlm_dagster.errors import SchemaError, WindowError
from vlm_dagster.windows import format_us, parse_instant

CADENCES = ("hourly", "daily", "weekly")
YEAR_9999_US = int(datetime(9999, 6, 1, tzinfo=UTC).timestamp()) * 1_000_000
WEEK_US = 7 * 86_400_000_000


@given(st.sampled_from(CADENCES), st.integers(WEEK_US, YEAR_9999_US))
def test_every_instant_lies_in_exactly_one_window(cadence: str, time_us: int) -> None:
    grid = WindowGrid(cadence)
    window = grid.containing(time_us)
    assert window.start_us <= time_us < window.end_us
    assert window.end_us - window.start_us == grid.length_us
    assert grid.at(window.index + 1).start_us == window.end_us
    assert grid.at(window.index) == window


@given(st.sampled_from(CADENCES), st.integers(WEEK_US, YEAR_9999_US))
def test_a_key_names_its_window(cadence: str, time_us: int) -> None:
    window = WindowGrid(cadence).containing(time_us)
    assert WindowGrid(cadence).parse(window.key) == window
    assert WindowGrid(cadence).parse(window) == window
    assert set(window.segment) <= set("0123456789-")


@given(st.sampled_from(CADENCES), st.integers(WEEK_US, YEAR_9999_US), st.integers(0, 10))
def test_segments_sort_as_their_windows_do(cadence: str, time_us: int, steps: int) -> None:
    grid = WindowGrid(cadence)
    window = grid.containing(time_us)
    later = grid.at(window.index + steps)
    assert (window.segment <= later.segment) == (window <= later)


@pytest.mark.parametrize(
    ("cadence", "key", "start"),
    [
        ("hourly", "1997-09-20-13:00", "1997-09-20T13:00:00Z"),
        ("daily", "1997-09-20", "1997-09-20T00:00:00Z"),
        ("weekly", "1997-09-21", "1997-09-21T00:00:00Z"),  # a Sunday
        ("daily", "1970-01-01", "1970-01-01T00:00:00Z"),
        ("daily", "2000-02-29", "2000-02-29T00:00:00Z"),
    ],
)
def test_keys_are_spelled_as_dagster_spells_them(cadence: str, key: str, start: str) -> None:
    assert format_us(WindowGrid(cadence).parse(key).start_us) == start


@pytest.mark.parametrize(
    ("cadence", "key", "words"),
    [
        ("daily", "1997-9-20", "1997-10-13"),
        ("daily", "", "not a daily key"),
        ("daily", "1997-09-20\n", "not a daily key"),
        ("daily", "١٩٩٧-٠٩-٢٠", "no such date|not a daily key"),
        ("daily", "1997-02-30", "no such date"),
        ("daily", "1969-12-31", "before 1970"),
        ("daily", None, "not a daily key"),
        ("daily", 20, "not a daily key"),
        ("daily", "../../etc", "not a daily key"),
        ("weekly", "1997-09-20", "1997-09-14"),  # a Saturday; the week began on the 14th
        ("weekly", "1970-01-01", "before 1970|no weekly window"),
        ("hourly", "1997-09-20-13:30", "1997-09-20-13:00"),
        ("hourly", "1997-09-20", "1997-10-13-00:00"),
        ("hourly", "1997-09-20-24:00", "no such date"),
    ],
)
def test_a_key_off_the_grid_is_refused_with_one_that_is_on_it(
    cadence: str, key: object, words: str
) -> None:
    with pytest.raises(WindowError, match=words) as caught:
        WindowGrid(cadence).parse(key)  # type: ignore[arg-type]
    assert caught.value.key == key


def test_between_lists_the_windows_that_overlap_a_span() -> None:
    grid = WindowGrid("daily")
    day = grid.parse("1997-09-20")
    after = grid.at(day.index + 1)
    assert grid.between(day.start_us, day.start_us) == []
    assert grid.between(day.start_us, day.start_us + 1) == [day]
    assert grid.between(day.start_us, day.end_us) == [day]
    assert grid.between(day.end_us - 1, day.end_us + 1) == [day, after]
    assert grid.between(day.end_us, day.start_us) == []


def test_an_instant_beyond_the_calendar_belongs_nowhere() -> None:
    grid = WindowGrid("daily")
    assert "1997-09-20" in grid.home_of(grid.parse("1997-09-20").start_us)
    for far in (10**18, -(10**18), 2**63 - 1, -1):
        assert "check its unit" in grid.home_of(far)
    with pytest.raises(WindowError, match="calendar"):
        grid.containing(10**18)


def test_an_unknown_cadence_is_refused() -> None:
    with pytest.raises(SchemaError, match="hourly, daily, weekly"):
        WindowGrid("monthly")  # type: ignore[arg-type]


def test_windows_are_values() -> None:
    window = WindowGrid("hourly").parse("1997-09-20-13:00")
    assert pickle.loads(pickle.dumps(window)) == window
    assert {window: 1}[WindowGrid("hourly").at(window.index)] == 1
    assert str(window) == "1997-09-20-13:00"
    assert isinstance(window, Window)


@given(st.integers(0, YEAR_9999_US))
def test_instants_read_back_from_their_text(time_us: int) -> None:
    assert parse_instant(format_us(time_us)) == time_us


def test_an_instant_needs_a_time_zone_unless_it_is_a_date() -> None:
    assert parse_instant("1970-01-02") == 86_400_000_000
    assert parse_instant("1970-01-01T01:00:00+01:00") == 0
    with pytest.raises(SchemaError, match="no time zone"):
        parse_instant("1970-01-02T00:00:00")


def test_times_beyond_the_calendar_are_still_shown() -> None:
    assert format_us(2**63 - 1) == f"{2**63 - 1} us"
