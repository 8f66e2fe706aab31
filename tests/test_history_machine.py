"""Everything that can happen to a history, in any order, against a model that is a few lists.

Sealing (gaps, empty days, again), compaction, corrections, erasure, dropping by age, collecting old
versions, another writer's rewrite: after every step, reading gives what the model says, and every pin ever
taken replays what it showed, less what was erased or dropped since; or says why it cannot.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from reference import checksum
from strategies import DAY_US, FIRST_DAY, at, day, event_table, few, group_of

from vlm_dagster import HistoryStore, PointerDataset, Projection, SequenceLoader, SnapshotRef
from vlm_dagster.errors import InvalidEventsError, PinError, WindowError, WindowSealedError
from vlm_dagster.retention import gc

NUM_DAYS = 7
USERS = [0, 1, 2, 3]
GROUP = group_of()


@dataclass
class Pinned:
    """A pin, what it showed, what its days held before any were dropped, and what happened since."""

    ref: SnapshotRef
    histories: dict[int, list[int]]
    undropped: dict[int, list[int]]
    ends: dict[int, int]
    days: dict[int, int]
    named: str | None = None
    retired: bool = False


@dataclass
class Examples:
    """A window of pointers: its key, the pin, and for each example the events and the start."""

    day: int
    pinned: Pinned
    sequences: dict[tuple[int, int], tuple[int, list[int]]]


@dataclass
class Model:
    """What a history holds, in plain lists."""

    content: dict[int, list[dict]] = field(default_factory=dict)
    revisions: dict[int, int] = field(default_factory=dict)
    gone: set[tuple[int, int]] = field(default_factory=set)  # (user, event id)
    erased_events: set[tuple[int, int]] = field(
        default_factory=set
    )  # of these, and of dropped days
    counts: dict[int, int] = field(default_factory=lambda: dict.fromkeys(USERS, 0))
    dropped_through: int = -1
    erased: dict[int, int] = field(default_factory=dict)  # user: the last day that it covers

    def covered(self) -> list[int]:
        days = []
        while len(days) in self.content:
            days.append(len(days))
        return days

    def left(self, days: list[int]) -> dict[int, list[int]]:
        """Every user's event ids that are there, oldest first."""
        return self.without(days, self.gone)

    def without(self, days: list[int], left_out: set[tuple[int, int]]) -> dict[int, list[int]]:
        """Every user's event ids but some, oldest first."""
        found = {}
        for user in USERS:
            events = [e for d in days for e in self.content[d] if e["user_id"] == user]
            events.sort(key=lambda e: (e["available_at"], e["event_id"]))
            found[user] = [e["event_id"] for e in events if (user, e["event_id"]) not in left_out]
        return found

    def end(self, user: int) -> int:
        """A user's end position, which counts what is gone; 0 where no day is covered yet."""
        days = self.covered()
        return self.counts[user] + len(self.left(days)[user]) if days else 0

    def remove(self, days: list[int], users: list[int]) -> None:
        for d in days:
            for event in self.content[d]:
                key = (event["user_id"], event["event_id"])
                if event["user_id"] in users and key not in self.gone:
                    self.gone.add(key)
                    self.counts[event["user_id"]] += 1


class HistoryMachine(RuleBasedStateMachine):
    """One history table and one pointer dataset."""

    @initialize(buckets=st.integers(1, 3))
    def begin(self, buckets: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vlm-machine-"))
        self.store = HistoryStore.create(
            self.folder / "h", GROUP, buckets, start=FIRST_DAY, bands=(1, 2, 5)
        )
        self.dataset = PointerDataset.create(self.folder / "p", ["ratings"], num_buckets=2)
        self.model = Model()
        self.pins: list[Pinned] = []
        self.examples: list[Examples] = []
        self.next_id = 0

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    def events(self, number: int, draw: list[tuple[int, int]]) -> list[dict]:
        """New events of a day: (user, time) pairs, with ids of their own."""
        found = []
        for user, second in draw:
            self.next_id += 1
            when = at(number, second * 1_000_000)
            found.append(
                {
                    "user_id": user,
                    # Not in order of time.
                    "event_id": self.next_id * 7919 % 10_007,
                    "event_time": when,
                    "available_at": when,
                    "item_id": self.next_id,
                    "rating": 1.0,
                    "title": "",
                    "liked": True,
                }
            )
        return found

    some_events = st.lists(st.tuples(st.sampled_from(USERS), st.integers(0, 5)), max_size=10)

    def refused_for_erasure(self, number: int, events: list[dict]) -> bool:
        return any(self.model.erased.get(e["user_id"], -1) >= number for e in events)

    # -- what can happen ----------------------------------------------------------------------

    @rule(number=st.integers(0, NUM_DAYS - 1), draw=some_events, fresh=st.booleans())
    def seal(self, number: int, draw: list[tuple[int, int]], fresh: bool) -> None:
        if not fresh and len(self.model.covered()) < NUM_DAYS:
            number = len(self.model.covered())
        model = self.model
        if number in model.content:
            events = model.content[number]
            assert self.store.seal(day(number), event_table(events, GROUP)).reused
            left = [e for e in events if (e["user_id"], e["event_id"]) not in model.gone]
            assert self.store.seal(day(number), event_table(left, GROUP)).reused
            if left:
                try:
                    self.store.seal(day(number), event_table(left[1:], GROUP))
                except WindowSealedError:
                    pass
                else:
                    # Allowed only if what was left out is what was gone: then it is the same.
                    raise AssertionError("other content was accepted")
            return
        events = self.events(number, draw)
        if self.refused_for_erasure(number, events):
            try:
                self.store.seal(day(number), event_table(events, GROUP))
            except InvalidEventsError:
                return
            raise AssertionError("an erased user came back")
        self.store.seal(day(number), event_table(events, GROUP))
        model.content[number] = events
        model.revisions[number] = 1

    @precondition(lambda self: len(self.model.covered()) < NUM_DAYS)
    @rule(draw=st.lists(some_events, min_size=2, max_size=2), fanout=st.integers(2, 4))
    def days_go_by(self, draw: list[list[tuple[int, int]]], fanout: int) -> None:
        """Pins are taken, and then segments reach past what they show."""
        self.pin(named=False)
        for some in draw:
            number = len(self.model.covered())
            allowed = [u for u in USERS if self.model.erased.get(u, -1) < number]
            if number < NUM_DAYS:
                self.seal(number, [(u, t) for u, t in some if u in allowed], fresh=True)
        self.store.compact(fanout=fanout)

    @rule(fanout=st.integers(2, 4), most=st.sampled_from([2, 4, 16]))
    def compact(self, fanout: int, most: int) -> None:
        self.store.compact(fanout=fanout, max_windows=most)

    @precondition(lambda self: self.model.content)
    @rule(data=st.data(), draw=some_events)
    def correct(self, data: st.DataObject, draw: list[tuple[int, int]]) -> None:
        days = [d for d in self.model.content if d > self.model.dropped_through]
        if not days:
            return
        number = data.draw(st.sampled_from(sorted(days)))
        kept = data.draw(st.booleans())
        old = [
            e
            for e in self.model.content[number]
            if kept and (e["user_id"], e["event_id"]) not in self.model.gone
        ]
        events = [*old, *self.events(number, draw)]
        table = event_table(events, GROUP)
        if self.refused_for_erasure(number, events):
            try:
                self.store.correct(day(number), table, reason="wrong")
            except InvalidEventsError:
                return
            raise AssertionError("an erased user came back")
        done = self.store.correct(day(number), table, reason="wrong")
        if not done.reused:
            self.model.content[number] = events
            self.model.revisions[number] += 1
            assert done.revision == self.model.revisions[number]

    @rule(users=st.lists(st.sampled_from(USERS), min_size=1, max_size=2, unique=True))
    def erase(self, users: list[int]) -> None:
        self.store.erase(users, reason="asked for", break_pins=True)
        days = list(self.model.content)
        self.model.remove(days, users)
        for d in days:
            held = [(e["user_id"], e["event_id"]) for e in self.model.content[d]]
            self.model.erased_events |= {key for key in held if key[0] in users}
        for user in users:
            self.model.erased[user] = max(days, default=-1)
        for pinned in self.pins:
            pinned.retired = True

    @rule(number=st.integers(0, NUM_DAYS - 1))
    def drop(self, number: int) -> None:
        done = self.store.drop_before(day(number))
        days = [d for d in self.model.content if day(d) in done.windows]
        assert all(d < number for d in days)
        self.model.remove(days, USERS)
        self.model.dropped_through = max([self.model.dropped_through, *days])

    @rule(moving=st.booleans())
    def collect(self, moving: bool) -> None:
        gc(self.store, dry_run=False, keep_hours=0, move_pins=moving)
        newest = self.store.snapshot().version
        held = {e.pinned.ref.version for e in self.examples}
        held |= {p.ref.version for p in self.pins if p.named}
        for pinned in self.pins:
            version = pinned.ref.version
            if version < newest and (moving or version not in held):
                # Whether it was, with `moving`, depends on a proof: then both will do.
                pinned.retired = pinned.retired or not moving or self.gone_version(pinned)

    def gone_version(self, pinned: Pinned) -> bool:
        return pinned.ref.version in self.store._table.state().retired

    @precondition(lambda self: len(self.store._table.files(self.store.snapshot().version)) > 1)
    @rule()
    def another_writer_rewrites(self) -> None:
        """`OPTIMIZE`: the same rows in files without our index."""
        DeltaTable(self.store.uri).optimize.compact()
        self.store = HistoryStore.open(self.store.uri)

    @rule(named=st.booleans())
    def pin(self, named: bool) -> None:
        snapshot = self.store.snapshot()
        days = self.model.covered()
        name = f"pin-{len(self.pins)}" if named else None
        if name is not None:
            self.store.pin(name, snapshot.version, reason="a test")
        left = self.model.left(days)
        ends = {user: self.model.end(user) for user in USERS}
        revisions = {d: self.model.revisions[d] for d in days}
        undropped = self.model.without(days, self.model.erased_events)
        self.pins.append(Pinned(snapshot.ref(), left, undropped, ends, revisions, name))

    @precondition(lambda self: self.model.covered())
    @rule(data=st.data(), length=st.sampled_from([None, 2]))
    def point(self, data: st.DataObject, length: int | None) -> None:
        """Every event of a day is to be predicted."""
        sealed = {e.day for e in self.examples}
        days = [d for d in self.model.covered() if d not in sealed]
        if not days:
            return
        number = data.draw(st.sampled_from(days))
        left = self.model.left(self.model.covered())
        self.pin(named=False)
        pinned = self.pins[-1]
        times = {e["event_id"]: e["available_at"] for d in self.model.content.values() for e in d}
        wanted = [
            (e["user_id"], e["event_id"])
            for e in self.model.content[number]
            if e["event_id"] in left[e["user_id"]]
        ]
        table = pa.table(
            {
                "user_id": pa.array([u for u, _ in wanted], pa.int64()),
                "event_id": pa.array([e for _, e in wanted], pa.int64()),
            }
        )
        if number <= self.model.dropped_through:
            # How many of the dropped events came before a request, nobody knows any more.
            with pytest.raises(WindowError, match="dropped by age"):
                self.dataset.seal(day(number), table, {"ratings": pinned.ref.open()})
            return
        self.dataset.seal(day(number), table, {"ratings": pinned.ref.open()})
        sequences = {}
        for user, event in wanted:
            before = [e for e in left[user] if times[e] < times[event]]
            sequences[user, event] = (self.model.counts[user], before)
        self.examples.append(Examples(number, pinned, sequences))
        self.check_checksums(number, sequences)

    def check_checksums(
        self, number: int, sequences: dict[tuple[int, int], tuple[int, list[int]]]
    ) -> None:
        rows = self.dataset.snapshot([day(number)]).to_table().to_pylist()
        assert len(rows) == len(sequences)
        for row in rows:
            start, ids = sequences[row["user_id"], row["request_id"]]
            assert row["ratings_end_position"] == start + len(ids)
            assert row["ratings_checksum"] == checksum(ids, start)

    # -- what must hold -----------------------------------------------------------------------

    @invariant()
    def reading_gives_what_the_model_says(self) -> None:
        if not hasattr(self, "store"):
            return
        snapshot = HistoryStore.open(self.store.uri).snapshot()
        left = self.model.left(self.model.covered())
        assert snapshot.num_events == sum(map(len, left.values()))
        for length in (None, 2):
            read = snapshot.read(USERS, Projection(["event_id", "available_at"], length))
            for row, user in enumerate(USERS):
                expected = left[user][-length if length else 0 :]
                assert read.of(row)["event_id"].to_pylist() == expected
                assert read.end_positions[row] == self.model.end(user)
        assert snapshot.verify(deep=True).ok

    @invariant()
    def every_pin_replays(self) -> None:
        for pinned in getattr(self, "pins", []):
            corrected = any(self.model.revisions[d] != r for d, r in pinned.days.items())
            dropped = self.model.dropped_through >= max(pinned.days, default=-1) >= 0
            problem = ""
            try:
                snapshot = pinned.ref.open()
            except PinError as error:
                problem = str(error)
            if problem:
                assert pinned.retired, problem
                assert corrected or dropped, problem
                assert "retired" in problem or "dropped" in problem
                continue
            if pinned.named is not None and not corrected:
                assert snapshot.digest == pinned.ref.digest
            self.replays(pinned, snapshot)

    def replays(self, pinned: Pinned, snapshot) -> None:
        read = snapshot.read(USERS, Projection(["event_id"]))
        whole = not pinned.retired
        for row, user in enumerate(USERS):
            found = read.of(row)["event_id"].to_pylist()
            shown = pinned.histories[user]
            if whole:
                assert found == shown
                assert read.end_positions[row] == pinned.ends[user]
            else:
                left = [e for e in shown if (user, e) not in self.model.gone]
                # Or more: the version that is kept may be from before a drop that the pin was after.
                erased = self.model.erased_events
                more = [e for e in pinned.undropped[user] if (user, e) not in erased]
                more = more[max(len(more) - len(found), 0) :] if len(found) > len(left) else left
                assert found in (shown, left, more)

    @invariant()
    def every_example_is_rebuilt_or_named(self) -> None:
        for examples in getattr(self, "examples", []):
            pinned = examples.pinned
            corrected = any(self.model.revisions[d] != r for d, r in pinned.days.items())
            ref = self.dataset.ref([day(examples.day)])
            projections = {"ratings": Projection(["event_id"])}
            problem = ""
            found: dict[tuple[int, int], list[int]] = {}
            try:
                loader = SequenceLoader(ref, projections, 64, gone="drop", num_workers=0)
                for batch in loader:
                    sequence = batch.sequences["ratings"]
                    offsets, ids = np.asarray(sequence.offsets), sequence.values["event_id"]
                    for row in range(batch.batch_size):
                        key = (
                            int(batch.examples["user_id"][row]),
                            int(batch.examples["request_id"][row]),
                        )
                        found[key] = ids[offsets[row] : offsets[row + 1]].tolist()
            except PinError as error:
                problem = str(error)
            if problem:
                assert pinned.retired, problem
                assert corrected or "dropped" in problem
                continue
            assert len(found) + loader.num_dropped == len(examples.sequences)
            for key, ids in found.items():
                assert ids == examples.sequences[key][1]
            gone = self.model.gone
            for key, (_, ids) in examples.sequences.items():
                touched = any((key[0], e) in gone for e in ids)
                if key not in found:
                    assert touched
                elif touched and pinned.retired and not corrected:
                    # A version from before a drop may be kept; what was erased is in none.
                    assert not any((key[0], e) in self.model.erased_events for e in ids)


assert DAY_US


def test_whatever_happens() -> None:
    run_state_machine_as_test(
        HistoryMachine, settings=settings(few(30), stateful_step_count=20, deadline=None)
    )
