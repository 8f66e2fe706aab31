"""From requests to pointers: count what was available before each request, and checksum it.

Works on chunks of requests, sorted by user, that hold users whole. Only two things are
read from the histories: the times of the events in the request's own window (all windows before
count as a whole, from the files' indices), and the ids and times of the events that the pointers span.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vlm_dagster.errors import InvalidRequestsError
from vlm_dagster.hashing import id_words, mix64, run_lengths
from vlm_dagster.history import Histories, Snapshot
from vlm_dagster.history.arena import BucketIndex
from vlm_dagster.pointers.spans import spans
from vlm_dagster.pointers.spec import PointerSpec, pointer_fields
from vlm_dagster.schema import TIME_TYPE
from vlm_dagster.windows import Window

__all__ = ["PointerBuilder"]

I64 = npt.NDArray[np.int64]

_MAX_REQUESTS_AT_ONCE = 131_072


class PointerBuilder:
    """Resolves requests of one window against one snapshot of each group; counts as it goes.

    Attributes:
        num_empty: requests whose every history is empty.
        num_unknown: those of them whose user has no event in any snapshot at all.
    """

    def __init__(self, spec: PointerSpec, window: Window, snapshots: Mapping[str, Snapshot]):
        self._spec = spec
        self._window = window
        self._snapshots = snapshots
        self.num_empty = 0
        self.num_unknown = 0
        self._lock = threading.Lock()

    def __call__(self, chunks: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Requests in, sorted, with users whole; pointers out, in the table's order."""
        for chunk in chunks:
            yield from map(self._resolve, _portions(chunk))

    def _resolve(self, requests: pa.RecordBatch) -> pa.RecordBatch:
        users, num_requests = run_lengths(requests.column("user_id"))
        rank = np.repeat(np.arange(len(users)), num_requests)
        # A history may be bucketed otherwise than the requests are, so the users decide.
        indices = {g: s.index_of(users) for g, s in self._snapshots.items()}
        recent = {g: self._recent(g, indices[g]) for g in self._spec.groups}
        if self._spec.request == "event_id":
            times = self._event_times(requests, rank, recent[self._spec.target_group])
        else:
            times = _as_int(requests.column("request_time"))
        columns = {name: requests.column(name) for name in self._spec.request_schema.names}
        columns["request_time"] = pa.array(times).cast(TIME_TYPE)
        empty = np.ones(len(rank), bool)
        known = np.zeros(len(users), bool)
        for group in self._spec.groups:
            end = self._end_positions(recent[group], rank, times)
            length = end - indices[group].gone[rank]
            if self._spec.max_length is not None:
                length = np.minimum(length, self._spec.max_length)
            parts = _measure(indices[group], rank, end, length, times)
            for part, name in pointer_fields(group).items():
                values = pa.array(parts[part])
                columns[name] = values.cast(TIME_TYPE) if part.endswith("_time") else values
            empty &= length == 0
            known |= indices[group].num_events > 0
        with self._lock:
            self.num_empty += int(empty.sum())
            self.num_unknown += int((~known[rank]).sum())
        names = self._spec.schema.names
        built = pa.record_batch([columns[name] for name in names], names=names)
        if self._spec.request == "event_id":
            # They came sorted by (user, id): their times were not known then.
            built = built.take(_order(rank, times, requests.column("request_id")))
        return built

    def _recent(self, group: str, index: BucketIndex) -> Histories:
        """Times, and for the target group ids, of the events in the request's own window."""
        times = self._snapshots[group].times_of(index.user_ids)
        before = sum(end_us <= self._window.start_us for _, end_us in times)
        through = sum(start_us < self._window.end_us for start_us, _ in times)
        columns = ["available_at"]
        if self._spec.request == "event_id" and group == self._spec.target_group:
            columns.append("event_id")
        return index.read(
            columns, index.num_events_before(before), index.num_events_before(through)
        )

    def _end_positions(self, recent: Histories, rank: I64, times: I64) -> I64:
        """[P] how many events of the user were available strictly before the request.

        One binary search for all: users and times combine into one ascending key.
        """
        available = _as_int(recent.columns["available_at"])
        low = min(int(available.min()), int(times.min())) if len(available) else 0
        high = max(int(available.max()), int(times.max())) if len(available) else 0
        span = high - low + 1
        users = np.repeat(np.arange(len(recent.lengths)), recent.lengths)
        at = np.searchsorted(users * span + (available - low), rank * span + (times - low))
        first = recent.end_positions - recent.lengths
        if not len(available):
            at = np.zeros(len(rank), np.int64)
        return np.asarray(first[rank] + (at - recent.offsets[:-1][rank]), np.int64)

    def _event_times(self, requests: pa.RecordBatch, rank: I64, recent: Histories) -> I64:
        """[P] when the event that each request names became available."""
        ids = requests.column("request_id")
        users = np.repeat(np.arange(len(recent.lengths)), recent.lengths)
        events = recent.columns["event_id"]
        keys = mix64(users.astype(np.uint64)) ^ id_words(events)
        wanted = mix64(rank.astype(np.uint64)) ^ id_words(ids)
        available = _as_int(recent.columns["available_at"])
        inside = (available >= self._window.start_us) & (available < self._window.end_us)
        rows = np.flatnonzero(inside)
        order = rows[np.argsort(keys[rows], kind="stable")]
        at = np.searchsorted(keys[order], wanted)
        at = np.minimum(at, max(len(order) - 1, 0))
        if not len(order):
            self._refuse_event(requests, np.ones(len(rank), bool))
        found = order[at]
        # The key is a hash: what it finds has to be the event itself.
        same = pc.equal(events.take(pa.array(found)), ids).to_numpy(zero_copy_only=False)
        same &= users[found] == rank
        if not same.all():
            self._refuse_event(requests, ~same)
        return available[found]

    def _refuse_event(self, requests: pa.RecordBatch, bad: npt.NDArray[np.bool_]) -> None:
        first = int(np.flatnonzero(bad)[0])
        user = requests.column("user_id")[first].as_py()
        group = self._spec.target_group
        raise InvalidRequestsError(
            f"user {user!r} has no such event of {group!r} in window {self._window.key}",
            row=requests.column("row")[first].as_py(),
            column="event_id",
            value=requests.column("request_id")[first].as_py(),
            way_out=f"Request events that the snapshot of {group!r} holds in this window (by "
            "available_at), or use a dataset with request='request_time'.",
            num_rows=int(bad.sum()),
        )


def _portions(chunk: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Requests of whole users, so many at a time as are resolved at once."""
    _, counts = run_lengths(chunk.column("user_id"))
    ends = np.cumsum(counts)
    begin = 0
    while begin < chunk.num_rows:
        fit = int(np.searchsorted(ends, begin + _MAX_REQUESTS_AT_ONCE, side="right"))
        end = int(ends[fit - 1]) if fit else 0
        if end <= begin:  # one user with more
            end = int(ends[fit])
        yield chunk.slice(begin, end - begin)
        begin = end


def _as_int(times: pa.Array) -> I64:
    return np.asarray(times.cast(pa.int64()).to_numpy(zero_copy_only=False), np.int64)


def _order(rank: I64, times: I64, ids: pa.Array) -> pa.Array:
    table = pa.table({"rank": rank, "time": times, "id": ids})
    keys = [("rank", "ascending"), ("time", "ascending"), ("id", "ascending")]
    return pc.sort_indices(table, sort_keys=keys)


def _measure(index: BucketIndex, rank: I64, end: I64, length: I64, times: I64) -> dict[str, I64]:
    """The parts of one group's pointers, from the ids and times of the events they span."""
    checksums = np.zeros(len(rank), np.int64)
    # An empty range has no events to take times from; its request's time stands in.
    start_times, end_times = times.copy(), times.copy()
    for span in spans(index, ["event_id", "available_at"], rank, end, length):
        checksums[span.rows] = span.checksums()
        available = _as_int(span.arena.columns["available_at"])
        start_times[span.rows] = available[span.begins]
        end_times[span.rows] = available[span.ends - 1]
    return {
        "end_position": end,
        "length": length,
        "start_time": start_times,
        "end_time": end_times,
        "checksum": checksums,
    }
