"""Made-up events are the same everywhere, look like people's, and hold something to learn."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_dagster.errors import SchemaError, TableError
from vlm_dagster.events import GeneratorConfig, input_schema, land, open_source
from vlm_dagster.events.generate import ACTIONS, INTERACTIONS, generate, write
from vlm_dagster.events.people import exponential, log_uniform, lognormal, normal, zipf
from vlm_dagster.hashing import digest_rows
from vlm_dagster.windows import WindowGrid

HOUR_US = 3_600_000_000
DAY_US = 24 * HOUR_US
SMALL = GeneratorConfig(
    num_users=300, num_items=1_003, num_topics=10, num_days=8, longest_history=900, seed=7
)
I64 = npt.NDArray[np.int64]


def table(batches: Iterable[pa.RecordBatch]) -> pa.Table:
    return pa.Table.from_batches(batches, input_schema(INTERACTIONS))


def micros(events: pa.Table, name: str) -> I64:
    return events[name].cast(pa.int64()).to_numpy()


@pytest.fixture(scope="module")
def people() -> pa.Table:
    """The default config's events, each user's in order of availability."""
    events = table(generate(GeneratorConfig()).batches())
    return events.sort_by([(n, "ascending") for n in ("user_id", "available_at", "event_id")])


@pytest.fixture(scope="module")
def questions(people: pa.Table) -> I64:
    """Where some sessions begin, of users with at least 120 events before."""
    users, times = people["user_id"].to_numpy(), micros(people, "event_time")
    starts = np.flatnonzero(np.diff(users, prepend=-1))
    lengths = np.diff(np.append(starts, len(users)))
    position = np.arange(len(users)) - np.repeat(starts, lengths)
    begins = np.diff(times, prepend=times[0]) > HOUR_US
    found = np.flatnonzero(begins & (position >= 120))
    return np.random.default_rng(1).choice(found, 3_000, replace=False)


class TestSameEverywhere:
    def test_the_events_of_a_seed_never_change(self) -> None:
        # They may change only together with the version in `generate.py`: landings, examples
        # and published figures are reproduced from the config alone.
        events = table(generate(SMALL).batches()).combine_chunks()
        assert str(digest_rows(events)) == "vlm1-15347-3c351d41021f23788f4a75c1d953e2c1"
        raw = b"".join(np.ascontiguousarray(c.to_numpy()).tobytes() for c in events.columns)
        assert hashlib.sha256(raw).hexdigest() == (
            "7ecff0fb8a5f0372b42a49d1ca12d0020ca6583ce22b66be30b836c6b4c912c7"
        )

    def test_another_seed_gives_other_events(self) -> None:
        other = dataclasses.replace(SMALL, seed=8)
        ours, theirs = (table(generate(c).batches()) for c in (SMALL, other))
        assert not ours.equals(theirs)

    def test_reading_twice_gives_the_same(self) -> None:
        source = generate(SMALL)
        assert table(source.batches()).equals(table(source.batches()))

    def test_a_day_does_not_depend_on_the_days_before(self) -> None:
        people = generate(SMALL)._people
        late_first = [people.events(5, 0), people.events(0, 0)]
        again = [people.events(0, 0), people.events(5, 0)]
        for left, right in zip(late_first, reversed(again), strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))

    def test_files_hold_what_the_stream_holds(self, tmp_path: Path) -> None:
        written = write(SMALL, tmp_path / "g")
        streamed = table(generate(SMALL).batches())
        assert table(written.batches()).equals(streamed)
        opened = open_source(tmp_path / "g", "generated")
        assert opened.group == INTERACTIONS
        assert table(opened.batches()).equals(streamed)
        assert written.num_events == streamed.num_rows
        assert len(written.paths) == SMALL.num_days
        assert written.paths[0].endswith("events-2025-01-01.parquet")
        assert written.paths[-1].endswith("events-2025-01-08.parquet")

    def test_files_have_the_same_bytes_every_time(self, tmp_path: Path) -> None:
        one, two = (write(SMALL, tmp_path / name) for name in ("a", "b"))
        for left, right in zip(one.paths, two.paths, strict=True):
            assert Path(left).read_bytes() == Path(right).read_bytes()


class TestFolders:
    def test_the_same_config_reuses_its_folder(self, tmp_path: Path) -> None:
        write(SMALL, tmp_path / "g")
        stamp = (tmp_path / "g" / "generated.json").stat().st_mtime_ns
        write(SMALL, tmp_path / "g")
        assert (tmp_path / "g" / "generated.json").stat().st_mtime_ns == stamp
        with pytest.raises(TableError, match="generated with other values"):
            write(dataclasses.replace(SMALL, seed=8), tmp_path / "g")
        assert [p.name for p in tmp_path.iterdir()] == ["g"]

    def test_a_folder_of_something_else_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("precious")
        with pytest.raises(TableError, match="not a folder of generated events"):
            write(SMALL, tmp_path)
        with pytest.raises(TableError, match="not a folder of generated events"):
            open_source(tmp_path / "gone", "generated")
        assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]

    def test_another_release_is_refused(self, tmp_path: Path) -> None:
        write(SMALL, tmp_path / "g")
        manifest = tmp_path / "g" / "generated.json"
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 2}))
        with pytest.raises(TableError, match="another release"):
            open_source(tmp_path / "g", "generated")

    def test_progress_reaches_the_end(self, tmp_path: Path) -> None:
        for run in (
            lambda p: write(SMALL, tmp_path / "g", p),
            lambda p: list(generate(SMALL).batches(p)),
        ):
            seen: list[int] = []
            run(seen.append)
            assert seen == sorted(seen)
            assert seen[-1] == generate(SMALL).num_bytes

    def test_a_landing_has_one_window_a_day(self, tmp_path: Path) -> None:
        landed = land(generate(SMALL), tmp_path / "l", WindowGrid("daily"))
        assert len(landed.windows) == SMALL.num_days
        assert land(generate(SMALL), tmp_path / "l", WindowGrid("daily")).reused
        other = dataclasses.replace(SMALL, seed=8)
        assert not land(generate(other), tmp_path / "l", WindowGrid("daily")).reused


class TestEventsAreWellFormed:
    def test_ids_are_unique_and_nothing_is_null(self, people: pa.Table) -> None:
        assert len(people["event_id"].unique()) == people.num_rows
        assert all(column.null_count == 0 for column in people.columns)
        assert people["event_id"].to_numpy().min() >= 0

    def test_availability_follows_the_event_and_stays_inside_the_days(
        self, people: pa.Table
    ) -> None:
        config = GeneratorConfig()
        event, available = micros(people, "event_time"), micros(people, "available_at")
        assert (available - event).min() >= 200_000
        assert event.min() >= config.start_us
        assert available.max() < config.start_us + config.num_days * DAY_US

    def test_values_stay_inside_what_is_declared(self, people: pa.Table) -> None:
        config = GeneratorConfig()
        for name, low, high in (
            ("user_id", 1, config.num_users),
            ("item_id", 1, config.num_items),
            ("category", 0, config.num_topics - 1),
            ("action", 0, len(ACTIONS) - 1),
        ):
            values = people[name].to_numpy()
            assert (values.min(), values.max()) == (low, high), name
        assert people["dwell_seconds"].to_numpy().min() > 0

    def test_an_item_has_one_author_and_one_category(self, people: pa.Table) -> None:
        pairs = people.group_by(["item_id", "author_id", "category"]).aggregate([])
        assert pairs.num_rows == len(people["item_id"].unique())
        authors = people.group_by(["author_id", "category"]).aggregate([])
        assert authors.num_rows == len(people["author_id"].unique())

    @given(
        st.builds(
            GeneratorConfig,
            num_users=st.integers(1, 60), num_items=st.integers(40, 500),
            num_topics=st.integers(1, 20), num_days=st.integers(1, 5),
            start=st.sampled_from(["1970-01-01", "2024-02-28", "2031-12-31"]),
            events_per_user_day=st.floats(0, 20), heavy_user_share=st.floats(0, 1),
            longest_history=st.integers(100, 2_000), late_share=st.floats(0, 1),
            max_late_days=st.integers(1, 9), drift_days=st.floats(0.1, 400), seed=st.integers(0, 2**57),
        )
    )  # fmt: skip
    def test_every_valid_config_gives_valid_events(self, config: GeneratorConfig) -> None:
        for number, day in enumerate(generate(config).days()):
            events = table(day)
            events.validate(full=True)
            if events.num_rows == 0:
                continue
            days = (micros(events, "available_at") - config.start_us) // DAY_US
            assert set(days.tolist()) == {number}
            assert len(events["event_id"].unique()) == events.num_rows
            assert min(events["item_id"].to_numpy()) >= 1
            assert max(events["item_id"].to_numpy()) <= config.num_items

    def test_chunks_and_memory_are_bounded(self) -> None:
        config = GeneratorConfig(
            num_users=60_000, num_days=2, longest_history=200, heavy_user_share=0, num_items=1_000
        )
        source = generate(config)
        assert source._people.num_chunks == 3
        sizes = [batch.num_rows for batch in source.batches()]
        assert max(sizes) < 200_000
        users = table(source.batches())["user_id"].to_numpy()
        assert len(np.unique(users)) > 20_000
        assert users.max() > 59_900


class TestTheyLookLikePeoples:
    def test_there_are_about_as_many_as_expected(self, people: pa.Table) -> None:
        assert people.num_rows == pytest.approx(
            generate(GeneratorConfig()).expected_num_events, rel=0.1
        )

    def test_activity_is_heavy_tailed(self, people: pa.Table) -> None:
        counts = np.sort(np.bincount(people["user_id"].to_numpy())[1:])
        assert counts[-20:].sum() > 0.08 * people.num_rows  # the busiest hundredth
        assert counts.mean() > 1.5 * np.median(counts)

    def test_the_longest_history_is_about_as_long_as_asked(self) -> None:
        config = dataclasses.replace(SMALL, num_users=50, num_days=30, longest_history=70_000)
        users = table(generate(config).batches())["user_id"].to_numpy()
        assert np.bincount(users).max() == pytest.approx(70_000, rel=0.25)

    def test_popularity_is_heavy_tailed(self, people: pa.Table) -> None:
        counts = np.sort(np.bincount(people["item_id"].to_numpy())[1:])
        assert counts[-50:].sum() > 0.1 * people.num_rows  # the most popular hundredth
        assert counts.mean() > 2 * np.median(counts)

    def test_the_declared_share_is_late(self, people: pa.Table) -> None:
        delay = micros(people, "available_at") - micros(people, "event_time")
        is_late = delay > HOUR_US
        assert is_late.mean() == pytest.approx(GeneratorConfig().late_share, abs=0.005)
        assert delay.max() <= 2 * DAY_US + HOUR_US
        assert np.median(delay[~is_late]) < 3_000_000

    def test_a_late_session_arrives_in_one_instant(self, people: pa.Table) -> None:
        delay = micros(people, "available_at") - micros(people, "event_time")
        late = people.filter(pa.array(delay > HOUR_US))
        arrivals = late.group_by(["user_id", "available_at"]).aggregate([])
        assert late.num_rows > 5 * arrivals.num_rows

    def test_days_have_nights_and_weeks_have_ends(self, people: pa.Table) -> None:
        hours = np.bincount(micros(people, "event_time") // HOUR_US % 24, minlength=24)
        assert hours[17:23].min() > 5 * hours[5:8].max()
        days = (micros(people, "event_time") - GeneratorConfig().start_us) // DAY_US
        counts = np.bincount(days)
        weekend = (np.arange(len(counts)) + 2) % 7 >= 5  # 2025-01-01 was a Wednesday
        assert counts[weekend].mean() > 1.15 * counts[~weekend].mean()

    def test_events_come_in_sessions(self, people: pa.Table) -> None:
        users, times = people["user_id"].to_numpy(), micros(people, "event_time")
        gaps = np.diff(times)[np.diff(users) == 0]
        assert np.mean(np.abs(gaps) < 10 * 60_000_000) > 0.8
        assert np.mean(np.abs(gaps) > 2 * HOUR_US) > 0.05

    def test_dwell_and_actions_rise_with_match(self, people: pa.Table) -> None:
        label = generate(GeneratorConfig()).label
        assert label is not None
        positive = label.apply(people).to_numpy()
        dwell = people["dwell_seconds"].to_numpy()
        assert 0.2 < positive.mean() < 0.45
        assert dwell[positive == 1].mean() > 1.2 * dwell[positive == 0].mean()
        counts = np.bincount(people["action"].to_numpy(), minlength=4)
        assert list(counts) == sorted(counts, reverse=True)
        assert counts.min() > 0


class TestThereIsSomethingToLearn:
    """Asked of the first event of a session, for users with at least 120 events before it."""

    @staticmethod
    def top_topics_hit(topics: I64, questions: I64, length: int) -> float:
        """How often the next topic is one of the three most frequent of the last events."""
        hits = 0
        for at in questions:
            recent = np.bincount(topics[at - length : at], minlength=25)
            hits += topics[at] in np.argsort(-recent, kind="stable")[:3]
        return hits / len(questions)

    def test_own_topics_beat_popular_topics(self, people: pa.Table, questions: I64) -> None:
        topics = people["category"].to_numpy().astype(np.int64)
        popular = np.argsort(-np.bincount(topics))[:3]
        baseline = np.isin(topics[questions], popular).mean()
        assert self.top_topics_hit(topics, questions, 100) > baseline + 0.2

    def test_longer_histories_know_tastes_better(self, people: pa.Table, questions: I64) -> None:
        topics = people["category"].to_numpy().astype(np.int64)
        hits = [self.top_topics_hit(topics, questions, length) for length in (5, 20, 100)]
        assert hits[1] > hits[0] + 0.03
        assert hits[2] > hits[1] + 0.02

    def test_longer_histories_hold_more_of_what_comes_back(
        self, people: pa.Table, questions: I64
    ) -> None:
        items = people["item_id"].to_numpy()
        found = [
            np.mean([items[at] in items[at - length : at] for at in questions])
            for length in (10, 120)
        ]
        assert found[1] > found[0] + 0.2

    def test_tastes_drift(self, people: pa.Table) -> None:
        """A user's topics of the first week say less about the fourth than of the third."""
        users, topics = people["user_id"].to_numpy(), people["category"].to_numpy()
        week = (micros(people, "event_time") - GeneratorConfig().start_us) // (7 * DAY_US)
        shares = np.zeros((5, 2_001, 25))
        np.add.at(shares, (week, users, topics), 1)
        totals = shares.sum(axis=2)
        active = (totals[[0, 2, 3]] >= 20).all(axis=0)
        mix = shares[:, active] / np.maximum(totals[:, active, None], 1)
        overlap = [np.minimum(mix[3], mix[w]).sum(axis=1).mean() for w in (0, 2)]
        assert overlap[1] > overlap[0] + 0.03

    def test_some_items_follow_others(self, people: pa.Table) -> None:
        users, items = people["user_id"].to_numpy(), people["item_id"].to_numpy().astype(np.int64)
        same = np.diff(users) == 0
        pairs, counts = np.unique(items[:-1][same] * 10_000 + items[1:][same], return_counts=True)
        best = np.zeros(5_001, np.int64)
        np.maximum.at(best, pairs // 10_000, counts)
        assert 0.3 < best.sum() / counts.sum() < 0.6

    def test_the_label_depends_on_taste(self, people: pa.Table) -> None:
        users, topics = people["user_id"].to_numpy(), people["category"].to_numpy()
        seen = np.zeros((2_001, 25))
        np.add.at(seen, (users, topics), 1)
        share = seen[users, topics] / seen[users].sum(axis=1)
        positive = people["action"].to_numpy() > 0
        assert positive[share > 0.3].mean() > 1.3 * positive[share < 0.05].mean()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_users": 0}, "num_users=0 is out of range"),
        ({"num_users": 2.5}, "num_users=2.5"),
        ({"num_days": True}, "num_days=True"),
        ({"late_share": 1.5}, "late_share=1.5 is out of range"),
        ({"late_share": float("nan")}, "late_share=nan"),
        ({"drift_days": 0}, "drift_days=0"),
        ({"seed": -1}, "seed=-1"),
        ({"start": "yesterday"}, "start='yesterday' is not a day"),
        ({"start": "1969-12-31"}, "start='1969-12-31' is not a day since 1970"),
        ({"start": "2025-01-01T00:00:00Z"}, "is not a day"),
        ({"num_items": 30}, "too few for 25 topics"),
        ({"longest_history": 100}, "less than what an average user has (180)"),
        ({"longest_history": 10**6}, "does not fit into 30 days"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(values: dict[str, object], says: str) -> None:
    with pytest.raises(SchemaError) as caught:
        GeneratorConfig(**values)  # type: ignore[arg-type]
    assert says in str(caught.value)


class TestDraws:
    """The quantile tables against the distributions that they stand for."""

    every = np.arange(1 << 16, dtype=np.uint16)

    def test_moments_are_right(self) -> None:
        assert normal(self.every).mean() == pytest.approx(0, abs=1e-9)
        assert normal(self.every).std() == pytest.approx(1, abs=1e-3)
        assert exponential(self.every).mean() == pytest.approx(1, abs=1e-3)
        assert lognormal(self.every, 1.1).mean() == pytest.approx(1, abs=1e-6)
        logs = np.log(lognormal(self.every, 1.1))
        assert logs.std() == pytest.approx(1.1, abs=2e-3)

    def test_zipf_ranks_follow_zipfs_law(self) -> None:
        raw = np.random.default_rng(0).integers(0, 2**64, 400_000, dtype=np.uint64)
        counts = np.bincount(zipf(raw, 1_000), minlength=1_000)
        assert len(counts) == 1_000
        assert counts[0] / counts[9] == pytest.approx(
            np.log(2) / np.log(11 / 10), rel=0.05
        )  # 1 / (r + 1), as the integral over [r, r + 1)
        assert counts[999] > 0

    def test_log_uniform_spans_its_range(self) -> None:
        raw = np.array([0, 1 << 31, (1 << 32) - 1], np.uint64)
        assert log_uniform(raw, 48.0) == pytest.approx([1, 48**0.5, 48], rel=1e-4)
