"""A history table at one version: what a pin names, and what training reads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vlm_dagster.errors import CorruptFileError, PinError, SchemaError
from vlm_dagster.hashing import bucket_of
from vlm_dagster.history.arena import BucketIndex, Histories
from vlm_dagster.history.buffers import ArenaBuffers
from vlm_dagster.retention.referrers import Referrer, register
from vlm_dagster.schema import FeatureGroup, Projection
from vlm_dagster.sealed import SealedTable, SealedWindow, TableState, VerifyReport
from vlm_dagster.sealed.gathering import gather
from vlm_dagster.sealed.gone import GoneRows, Removal
from vlm_dagster.sealed.incoming import widens
from vlm_dagster.sealed.reader import SegmentReader
from vlm_dagster.sealed.segments import Segment
from vlm_dagster.sealed.stats import ReadStats
from vlm_dagster.sealed.verify import verify
from vlm_dagster.storage import redact
from vlm_dagster.windows import WindowGrid, format_us

if TYPE_CHECKING:
    from vlm_dagster.history.store import HistoryStore

__all__ = ["PinOpener", "Snapshot", "SnapshotRef", "prefix_digest"]

I64 = npt.NDArray[np.int64]


def prefix_digest(windows: Sequence[SealedWindow]) -> str:
    """One digest of a run of windows: SHA-256 over their keys and digests, oldest first."""
    hasher = hashlib.sha256()
    for sealed in windows:
        hasher.update(f"{sealed.window.key} {sealed.digest}\n".encode())
    return hasher.hexdigest()


@dataclass(frozen=True)
class SnapshotRef:
    """A pin: names a snapshot so that it can be opened again, anywhere, and be the same.

    Picklable and JSON-able; holds no credentials.

    Attributes:
        uri: where the history table lies.
        table_id: the Delta table's own id.
        group: the feature group's name.
        version: the Delta version.
        watermark_us: the end of the last covered window, UTC microseconds; None if none is.
        digest: `prefix_digest` of the covered windows.
    """

    uri: str
    table_id: str
    group: str
    version: int
    watermark_us: int | None
    digest: str

    def open(
        self,
        storage_options: Mapping[str, str] | None = None,
        *,
        uri: str | None = None,
        store: HistoryStore | None = None,
    ) -> Snapshot:
        """Open what is pinned, refusing anything that is not it.

        That is the pinned version, or, where it was retired, the newest one that holds the same
        content up to the pin's watermark, proved by its digest, and shows nothing past it.

        Args:
            uri: where the table lies now, if it was moved.
            store: the table, if it is open already: many pins then share what was read of it.

        Raises:
            TableError: the table or the version is gone.
            PinError: what lies there is another table, or no version that is kept holds the content.
        """
        from vlm_dagster.history.store import HistoryStore

        store = store or HistoryStore.open(uri or self.uri, storage_options=storage_options)
        if store.table_id != self.table_id:
            raise PinError(
                f"history table {store.uri}",
                pinned=f"table id {self.table_id}",
                found=f"table id {store.table_id}",
                way_out="The table was recreated since; restore the pinned one, or rebuild the "
                "pointers against the new one.",
            )
        return store.pinned(self)

    def to_json(self) -> dict[str, Any]:
        return {
            "uri": redact(self.uri),
            "table_id": self.table_id,
            "group": self.group,
            "version": self.version,
            "watermark_us": self.watermark_us,
            "digest": self.digest,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SnapshotRef:
        return cls(
            uri=value["uri"],
            table_id=value["table_id"],
            group=value["group"],
            version=value["version"],
            watermark_us=value["watermark_us"],
            digest=value["digest"],
        )

    def __str__(self) -> str:
        mark = "nothing" if self.watermark_us is None else format_us(self.watermark_us)
        return f"{self.group} version {self.version} (complete up to {mark})"


class PinOpener:
    """Opens pins, each table once: many pins of one table then share what was read of it."""

    def __init__(self, storage_options: Mapping[str, str] | None = None) -> None:
        self._storage_options = storage_options
        self._stores: dict[str, HistoryStore] = {}

    def __call__(self, pin: SnapshotRef) -> Snapshot:
        """The pinned snapshot, or the errors of `SnapshotRef.open`."""
        from vlm_dagster.history.store import HistoryStore

        if pin.uri not in self._stores:
            self._stores[pin.uri] = HistoryStore.open(
                pin.uri, storage_options=self._storage_options
            )
        return pin.open(store=self._stores[pin.uri])


class Snapshot:
    """A history table at one version, complete up to its watermark. Get one from `HistoryStore`."""

    def __init__(
        self,
        table: SealedTable,
        group: FeatureGroup,
        state: TableState,
        *,
        pin: SnapshotRef | None = None,
    ) -> None:
        """
        Args:
            pin: what it was opened for: then nothing past the pin's watermark is shown.
        """
        self._table = table
        self._state = state
        self.group = group
        self._pin = pin
        self._covered = state.covered
        if pin is not None:
            mark = -1 if pin.watermark_us is None else pin.watermark_us
            self._covered = [one for one in self._covered if one.window.end_us <= mark]
        self._digest: str | None = None

    @property
    def uri(self) -> str:
        return self._table.uri

    @property
    def version(self) -> int:
        return self._state.version

    @property
    def num_buckets(self) -> int:
        return self._table.spec.num_buckets

    @property
    def grid(self) -> WindowGrid:
        return self._table.spec.grid

    @property
    def windows(self) -> list[SealedWindow]:
        """The windows that the watermark covers, oldest first: what this snapshot shows."""
        return list(self._covered)

    @property
    def watermark_us(self) -> int | None:
        """The end of the last window up to which none is missing, UTC microseconds."""
        return self._state.watermark_us if self._pin is None else self._pin.watermark_us

    @property
    def watermark(self) -> str | None:
        """`watermark_us` as ISO 8601."""
        return None if self.watermark_us is None else format_us(self.watermark_us)

    @property
    def num_events(self) -> int:
        """The events that can be read here."""
        return sum(self._state.left(sealed.window.index).num_rows for sealed in self._covered)

    @property
    def num_events_gone(self) -> int:
        """The events that were sealed and have left since: of erased users, or of dropped windows."""
        return sum(sealed.num_events for sealed in self._covered) - self.num_events

    def num_gone(self, sealed: SealedWindow) -> int:
        """The events of a window that have left since it was sealed."""
        return sealed.num_rows - self._state.left(sealed.window.index).num_rows

    @property
    def removals(self) -> tuple[Removal, ...]:
        """The record of what left the table, oldest first."""
        return self._state.gone.removals

    @property
    def digest(self) -> str:
        """One digest of all that this snapshot shows."""
        if self._digest is None:
            self._digest = prefix_digest(self._covered)
        return self._digest

    def digest_at(self, watermark_us: int | None) -> str:
        """The digest of only what lies before an earlier watermark."""
        if watermark_us is None:
            return prefix_digest([])
        return prefix_digest([s for s in self._covered if s.window.end_us <= watermark_us])

    def ref(self) -> SnapshotRef:
        """The pin that names this snapshot; the one that it was opened from, if it was."""
        return self._pin or SnapshotRef(
            uri=self.uri,
            table_id=self._table.table_id,
            group=self.group.name,
            version=self.version,
            watermark_us=self.watermark_us,
            digest=self.digest,
        )

    def enter(self, referrer: Referrer) -> None:
        """Enter what is about to refer to this table, so that no collection overlooks it.

        Raises:
            TableError: the table cannot be written, and it is not entered yet.
        """
        register(self._table, referrer)

    def covers(self, time_us: int) -> bool:
        """Whether the history before this instant is complete."""
        mark = self.watermark_us
        return mark is not None and time_us <= mark

    @cached_property
    def segments(self) -> list[Segment]:
        """The segments that hold the covered windows, oldest first; empty windows have none."""
        if not self._covered:
            return []
        last = self._covered[-1].window.index
        first = self._covered[0].window.index
        found = self._table.segments(self.version)
        return [one for one in found if first <= one.first <= last]

    def _reaches_past(self, segment: Segment) -> bool:
        """Whether a segment holds windows past the watermark too: it was compacted since a pin
        was taken, and only some of its rows count."""
        return segment.last > self._covered[-1].window.index

    @property
    def stats(self) -> ReadStats:
        """What has been read of this table through this store so far."""
        return self._table.stats

    @property
    def windows_past_watermark(self) -> list[SealedWindow]:
        """Windows that are sealed at this version but not shown, because one before is missing."""
        shown = {sealed.window.index for sealed in self._covered}
        sealed = sorted(self._state.sealed.items())
        return [found for index, found in sealed if index not in shown]

    def files(self, *, past_watermark: bool = False) -> pa.Table:
        """The files behind this snapshot: path, segment, bucket, num_rows, size_bytes; with
        `past_watermark` also those of sealed windows that it does not show."""
        files = self._table.files(self.version)
        if past_watermark:
            return files
        shown = pa.array([segment.name for segment in self.segments], pa.string())
        return files.filter(pc.is_in(files["segment"], shown))

    def verify(
        self,
        *,
        windows: Collection[str] | None = None,
        deep: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> VerifyReport:
        """Check that the files are what was sealed; see `vlm_dagster.sealed.verify`."""
        return verify(self._table, self.version, windows=windows, deep=deep, progress=progress)

    # -- reading ------------------------------------------------------------------------------

    def index_of(self, user_ids: pa.Array) -> BucketIndex:
        """Where events of these users (sorted, distinct) lie, whichever buckets they are in."""
        found = self._readers_of(user_ids)
        cut = {
            number: self._events_before_watermark(reader, user_ids)
            for number, (segment, reader) in enumerate(found)
            if self._reaches_past(segment)
        }
        return self._index([reader for _, reader in found], user_ids, cut)

    def _index(
        self,
        readers: Sequence[SegmentReader],
        user_ids: pa.Array,
        cut: Mapping[int, I64] = MappingProxyType({}),
    ) -> BucketIndex:
        gone = self.gone_of(user_ids).counts
        schema, aliases = self.group.event_schema, self.group.aliases
        return BucketIndex(readers, user_ids, schema, aliases, gone=gone, cut=cut)

    def gone_of(self, user_ids: pa.Array) -> GoneRows:
        """What of these users' histories was sealed and has left since."""
        if not self._covered:  # where nothing is shown, nothing is missing
            return GoneRows.none(len(user_ids))
        try:
            return self._table.gone_of(self._state.gone, user_ids)
        except CorruptFileError:
            self._table.check_kept(self.version)  # then it was collected with its version
            raise

    def _events_before_watermark(self, reader: SegmentReader, user_ids: pa.Array) -> I64:
        """[U] how many of each user's events in a file lie before the watermark: the oldest ones."""
        clock = self.group.clock
        whole = BucketIndex([reader], user_ids, self.group.event_schema)
        counts = whole.num_events
        read = whole.read([clock], np.zeros_like(counts), counts)
        times = np.asarray(read.columns[clock].cast(pa.int64()))
        before = np.concatenate([[0], np.cumsum(times < self.watermark_us)])
        return np.asarray(before[read.offsets[1:]] - before[read.offsets[:-1]], np.int64)

    def times_of(self, user_ids: pa.Array) -> list[tuple[int, int]]:
        """The time `[start_us, end_us)` of each file that `index_of` of the same users looks into,
        in its order."""
        grid = self.grid
        return [
            (grid.at(segment.first).start_us, grid.at(segment.last).end_us)
            for segment, _ in self._readers_of(user_ids)
        ]

    def _readers_of(self, user_ids: pa.Array) -> list[tuple[Segment, SegmentReader]]:
        """The files of these users' buckets, each with its segment, oldest segment first."""
        shown = {segment.name: segment for segment in self.segments}
        found = [
            (shown[name], reader)
            for bucket in np.unique(bucket_of(user_ids, self.num_buckets)).tolist()
            for name, reader in self._table.readers(self.version, bucket, shown)
        ]
        return sorted(found, key=lambda pair: pair[0])

    def count(self, user_ids: Sequence[Any] | pa.Array) -> I64:
        """[U] the number of events of each user, which is their end position; 0 if unknown."""
        return self.read(user_ids, Projection(traits=[], max_length=0)).end_positions

    def read(
        self,
        user_ids: Sequence[Any] | pa.Array,
        projection: Projection | None = None,
        *,
        buffers: ArenaBuffers | None = None,
        threads: int | None = None,
    ) -> Histories:
        """The newest `projection.max_length` events of some users, oldest first.

        Args:
            user_ids: [U], any order, repeats allowed; an unknown user has an empty history. Sorted
                users of one bucket take no further copy of what was decoded.
            projection: which traits, and how many newest events; all of both if None.
            buffers: memory to read into; fresh memory if None.
            threads: that decode. None: one, or from a million events on one a core, at most 4.

        Raises:
            SchemaError: the projection names a trait that the group does not have.
            CorruptFileError: a file is missing or damaged.
        """
        projection = projection or Projection()
        columns = projection.columns(self.group)
        asked = _user_array(user_ids, self.group)
        distinct = asked.unique().sort()
        buckets = bucket_of(distinct, self.num_buckets)
        parts: list[Histories] = []
        for bucket in np.unique(buckets):
            index = self.index_of(distinct.filter(pa.array(buckets == bucket)))
            end = index.num_events
            first = index.gone
            if projection.max_length is not None:
                first = np.maximum(end - projection.max_length, first)
            parts.append(index.read(columns, first, end, buffers=buffers, threads=threads))
        return _in_order(asked, parts, columns, self.group.event_schema)

    def index_through(self, user_ids: pa.Array, end: I64) -> BucketIndex:
        """`index_of` of users whose histories are known to reach at least `end`, [U]. It may reach
        past the watermark.

        Raises:
            PinError: a history ends before, so it is not the one that was pointed into.
        """
        index = self._index([reader for _, reader in self._readers_of(user_ids)], user_ids)
        short = np.flatnonzero(index.num_events < end)
        if len(short):
            i = int(short[0])
            raise PinError(
                f"history of user {user_ids[i].as_py()!r} in {self.uri} at version {self.version}",
                pinned=f"end position {end[i]}",
                found=f"{index.num_events[i]} events",
                way_out="The pointers were built on another history: read them with the "
                "snapshot that they pin.",
            )
        return index

    def column_chunks(self, column: str) -> Iterator[pa.Array]:
        """All values of one column, a file at a time, windows in order, rows as they lie there."""
        if column not in self.group.event_schema.names:
            self.group.trait(column)
        stored = self.group.aliases.get(column, column)
        for segment, reader in self._shown():
            if self._reaches_past(segment):
                rows = reader.read_groups(list(dict.fromkeys([stored, self.group.clock])))
                times = rows.column(self.group.clock).cast(pa.int64())
                yield from rows.filter(pc.less(times, self.watermark_us)).column(stored).chunks
            else:
                yield from reader.read_groups([stored]).column(stored).chunks

    def _shown(self) -> Iterator[tuple[Segment, SegmentReader]]:
        """The readers of all files and what they hold, oldest segment first."""
        segments = {segment.name: segment for segment in self.segments}
        found = self._table.all_readers(self.version, segments)
        return ((segments[name], reader) for name, reader in found)

    def readers(self) -> Iterator[SegmentReader]:
        """The readers of all files, oldest segment first."""
        return (reader for _, reader in self._shown())

    def user_ids(self) -> pa.Array:
        """Every user with an event here, sorted."""
        found = []
        for segment, reader in self._shown():
            users = reader.users.user_ids
            if self._reaches_past(segment):
                users = users.filter(pa.array(self._events_before_watermark(reader, users) > 0))
            found.append(users)
        if not found:
            return pa.array([], self.group.user_id)
        return pa.concat_arrays(found).unique().sort()


def _user_array(user_ids: Sequence[Any] | pa.Array, group: FeatureGroup) -> pa.Array:
    if isinstance(user_ids, pa.ChunkedArray):
        user_ids = user_ids.combine_chunks()
    what = f"user ids of feature group {group.name!r} are {group.user_id}"
    way_out = "Give ids of that type."
    try:
        array = user_ids if isinstance(user_ids, pa.Array) else pa.array(user_ids)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise SchemaError(f"{what} ({error})", way_out) from None
    if array.null_count:
        raise SchemaError("a user id is null", "Give ids only.")
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if len(array) and array.type != group.user_id and not widens(array.type, group.user_id):
        raise SchemaError(f"{what}, those asked for are {array.type}", way_out)
    return array.cast(group.user_id)


def _in_order(
    asked: pa.Array, parts: list[Histories], columns: Sequence[str], schema: pa.Schema
) -> Histories:
    """Lay the users of all buckets out as they were asked for."""
    if not parts:  # nobody was asked for
        values = {name: pa.array([], schema.field(name).type) for name in columns}
        return Histories(asked, np.zeros(1, np.int64), values, np.zeros(0, np.int64))
    users = pa.concat_arrays([part.user_ids for part in parts])
    bases = np.cumsum([0, *(part.num_events for part in parts[:-1])])
    starts = np.concatenate(
        [part.offsets[:-1] + base for part, base in zip(parts, bases, strict=True)]
    )
    lengths = np.concatenate([part.lengths for part in parts])
    ends = np.concatenate([part.end_positions for part in parts])
    if len(parts) == 1 and asked.equals(users):
        return parts[0]
    rows = pc.index_in(asked, value_set=users).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(lengths[rows])]).astype(np.int64)
    values = {}
    for name in columns:
        whole = pa.concat_arrays([part.columns[name] for part in parts])
        values[name] = gather(whole, starts[rows], lengths[rows])
    return Histories(asked, offsets, values, ends[rows])
