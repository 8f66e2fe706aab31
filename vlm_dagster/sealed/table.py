"""A sealed table: windows of sorted rows, each committed at most once, under a lock in the log.

Sealing has two halves: `stage` (here, with staging.py) and `commit_window` (commit.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import numpy as np
import pyarrow as pa
from deltalake import DeltaTable

from vlm_dagster.engines import Engine
from vlm_dagster.errors import (
    CorruptFileError,
    RetiredVersionError,
    StorageError,
    TableError,
    WindowError,
)
from vlm_dagster.hashing import bucket_of
from vlm_dagster.sealed.foreign import ForeignReader
from vlm_dagster.sealed.gone import Gone, GoneRows, GoneUsers
from vlm_dagster.sealed.handles import NewestHandle
from vlm_dagster.sealed.lifetimes import Kept, Lifetimes
from vlm_dagster.sealed.log import LogReader, TableState
from vlm_dagster.sealed.opening import create_delta, open_delta, plain, read_declaration
from vlm_dagster.sealed.reader import NoIndexError, SegmentReader
from vlm_dagster.sealed.segments import Segment, find_segments
from vlm_dagster.sealed.spec import TableSpec
from vlm_dagster.sealed.staging import StagedWindow, write_window
from vlm_dagster.sealed.stats import ReadStats
from vlm_dagster.sealed.versions import Versions
from vlm_dagster.storage import normalize_uri, open_storage
from vlm_dagster.windows import Window

__all__ = ["SealedTable"]

_READER_CACHE_BYTES = 256 << 20
_FOOTERS_AT_ONCE = 16


class SealedTable:
    """One sealed table. Histories and pointer datasets own one each; users do not meet it."""

    def __init__(
        self,
        uri: str,
        spec: TableSpec,
        handle: DeltaTable,
        storage_options: Mapping[str, str] | None,
    ) -> None:
        self.uri = uri
        self.spec = spec
        self.table_id = str(handle.metadata().id)
        self.storage = open_storage(uri, storage_options)
        self.storage_options = plain(storage_options)
        self.newest = NewestHandle(self.storage, self.handle, handle, self._forget)
        self.log = LogReader(self.storage)
        self.versions = Versions(uri, spec, self.log, self.state)
        self.stats = ReadStats()
        self._readers: dict[str, SegmentReader] = {}
        self._readers_bytes = 0
        self._files = lru_cache(maxsize=4)(self._load_files)
        self._checked = lru_cache(maxsize=4)(self._check_files)
        self._gone_users = lru_cache(maxsize=64)(lambda path: GoneUsers.read(self.storage, path))

    def _forget(self) -> None:
        """What was read of a log that somebody has cut and continued otherwise."""
        self.log.forget()
        self._files.cache_clear()
        self._checked.cache_clear()

    # -- opening ------------------------------------------------------------------------------

    @classmethod
    def create(cls, uri: str, spec: TableSpec, options: Mapping[str, str] | None) -> SealedTable:
        """Create the table, or open it if it is there with the same declaration."""
        uri = normalize_uri(uri)
        create_delta(uri, spec, options)
        declared, handle = read_declaration(uri, spec.kind, options)
        wanted = spec.to_json()
        for name in sorted({*declared, *wanted}):
            if declared.get(name) != wanted.get(name):
                raise TableError(
                    uri,
                    f"the table was created with {name} = {declared.get(name)!r}, not "
                    f"{wanted.get(name)!r}",
                    "Open it with `open`, declare the same values, or create a new table.",
                )
        return cls(uri, spec, handle, options)

    @classmethod
    def open(
        cls,
        uri: str,
        kind: str,
        revive: Callable[[dict[str, Any]], TableSpec],
        options: Mapping[str, str] | None,
    ) -> SealedTable:
        """Open an existing table. `revive` makes the spec from its declaration."""
        uri = normalize_uri(uri)
        declared, handle = read_declaration(uri, kind, options)
        return cls(uri, revive(declared), handle, options)

    def handle(self, version: int | None = None) -> DeltaTable:
        """A Delta handle at a version (the newest if None), checked to be this very table."""
        handle = open_delta(self.uri, version, self.storage_options)
        found = str(handle.metadata().id)
        if found != self.table_id:
            raise TableError(
                self.uri,
                f"another table lies here now (its id is {found}, not {self.table_id})",
                "Open the table again; pins to the earlier one cannot be replayed.",
            )
        return handle

    def state(self, version: int | None = None) -> TableState:
        """What is sealed at a version (the newest if None)."""
        if isinstance(version, int) and version >= 0:
            # The log says it all, unless the version is gone: then Delta says so in full.
            with contextlib.suppress(FileNotFoundError):
                return self._state_at(version)
        if version is None:
            with self.newest.lent() as handle:
                return self.state_of(handle)
        return self.state_of(self.handle(version))

    def _ledger_of(self, state: TableState) -> Gone:
        try:
            return state.gone
        except CorruptFileError:
            self.check_kept(state.version)  # then it was collected with its version
            raise

    def state_of(self, handle: DeltaTable) -> TableState:
        """What is sealed at the version of a handle."""
        return self._state_at(int(handle.version()))

    def _state_at(self, version: int) -> TableState:
        found = self.log.state(version, self.spec.grid, self.spec.start_index)
        return replace(found, load_gone=lambda: self._ledger_of(found))

    def check_kept(self, version: int) -> None:
        """RetiredVersionError if a version is not kept any more, so that its files may be gone."""
        retired = self.state().retired
        if version in retired:
            raise RetiredVersionError(table=self.uri, version=version, by=retired.by, at=retired.at)

    def explain_missing(self, path: str, version: int | None) -> None:
        """RetiredVersionError if a file is not there because no version that is kept needs it."""
        if version is not None:
            lifetimes = Lifetimes(self)
            retired = self.state(lifetimes.newest).retired
            if version in retired and not Kept(retired).meet(lifetimes.of(path)):
                self.check_kept(version)

    # -- sealing ------------------------------------------------------------------------------

    def check_window(self, key: str | Window, state: TableState) -> Window:
        """The window of a key, if the table can take it."""
        window = self.spec.grid.parse(key)
        # Positions count from the first window of a history. Examples do not build on each other.
        start = self.spec.start_index if self.spec.kind == "pointers" else state.start
        if start is not None and window.index < start:
            first = self.spec.grid.at(start).key
            raise WindowError(
                window.key,
                f"lies before the first window {first} of {self.uri}",
                "Its windows count from there, so earlier ones cannot be added: create a table "
                f"with start={window.key!r}.",
            )
        return window

    def stage(
        self,
        window: Window,
        state: TableState,
        rows: Iterator[pa.RecordBatch],
        schema: pa.Schema,
        *,
        engine: Engine,
        finish: Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]],
        facts: dict[str, Any],
        counts: Callable[[], dict[str, int]],
        again: bool = False,
    ) -> StagedWindow:
        """Sort rows into files and put these in place, uncommitted.

        Args:
            rows: validated rows, of `schema` plus `bucket` (int32) and `row` (int64, the number
                of the row in the input, from 0, ascending).
            finish: turns the rows of a bucket, sorted by (the table's sort columns as far as the
                rows have them, `row`) in chunks that hold users whole, into rows as stored, in the
                table's order. Called for several buckets at a time, in threads.
            facts: what to record beside the digest.
            counts: asked at the end for what was counted on the way, e.g. {"num_duplicates": 3}.
            again: write files even if the window is sealed, to correct it.
        """
        dry = window.index in state.sealed and not again
        incoming = schema.append(pa.field("row", pa.int64()))
        by = [*(c for c in self.spec.sort_columns if c in schema.names), "row"]
        with self.storage.scratch() as scratch:
            try:
                files, digest, num_users = write_window(
                    self.storage,
                    self.spec,
                    self.table_id,
                    window,
                    lambda work: engine.map_buckets(
                        rows, incoming, by, self.spec.num_buckets, scratch, work
                    ),
                    finish,
                    scratch,
                    dry=dry,
                )
            except OSError as error:
                if isinstance(error, StorageError):
                    raise
                raise StorageError(self.uri, f"staging window {window.key}", error) from error
        counted = counts()
        return StagedWindow(
            uri=self.uri,
            table_id=self.table_id,
            window=window,
            digest=str(digest),
            num_rows=digest.num_rows,
            num_users=num_users,
            num_duplicates=counted.get("num_duplicates", 0),
            files=tuple(files),
            facts={**facts, **counted, "num_users": num_users},
            already_sealed=dry,
        )

    # -- reading ------------------------------------------------------------------------------

    def files(self, version: int) -> pa.Table:
        """The live files at a version: path, segment, bucket, num_rows, size_bytes."""
        return self._files(version)

    def _load_files(self, version: int) -> pa.Table:
        with self.newest.lent() as newest:
            handle = newest if int(newest.version()) == version else self.handle(version)
            actions = pa.table(handle.get_add_actions(flatten=True))
        return _by_place(
            pa.table(
                {
                    "path": actions["path"].cast(pa.string()),
                    "segment": actions["partition.segment"].cast(pa.string()),
                    "bucket": actions["partition.bucket"].cast(pa.int32()),
                    "num_rows": actions["num_records"].cast(pa.int64()),
                    "size_bytes": actions["size_bytes"].cast(pa.int64()),
                }
            )
        )

    def segments(self, version: int) -> list[Segment]:
        """What the files at a version belong to, oldest first.

        Raises:
            TableError: they hold other windows, or other numbers of rows, than were sealed: other
                writers can add files, or rewrite them twice, and the log would not mind.
        """
        return self._checked(version)

    def _check_files(self, version: int) -> list[Segment]:
        counted = self.files(version).group_by("segment").aggregate([("num_rows", "sum")])
        rows = dict(zip(*(counted[c].to_pylist() for c in counted.column_names), strict=True))
        state = self.state(version)
        segments = find_segments(self.uri, rows, state)
        seen: set[int] = set()
        for segment in segments:
            indices = range(segment.first, segment.last + 1)
            self._check_rows(state, segment.name, indices, rows[segment.name])
            seen.update(indices)
        for index, sealed in state.sealed.items():
            if index not in seen:
                self._check_rows(state, sealed.window.key, [index], 0)
        return segments

    def _check_rows(self, state: TableState, name: str, indices: Sequence[int], found: int) -> None:
        expected = sum(state.left(index).num_rows for index in indices)
        if found != expected:
            raise TableError(
                self.uri,
                f"{'window' if len(indices) == 1 else 'segment'} {name} should have {expected} "
                f"rows, but at version {state.version} its files hold {found}: another writer "
                "changed the table",
                "Pin a version before that.",
            )

    def gone_of(self, gone: Gone, user_ids: pa.Array) -> GoneRows:
        """What is gone of each user's rows."""
        found = GoneRows.none(len(user_ids))
        if gone.buckets:
            buckets = bucket_of(user_ids, self.spec.num_buckets)
            for bucket in np.unique(buckets).tolist():
                mine = buckets == bucket
                users, salt = self.gone_users(gone, bucket), gone.salt
                found.fill(mine, users, user_ids.filter(pa.array(mine)), salt)
        return found

    def gone_users(self, gone: Gone, bucket: int) -> GoneUsers:
        """Who of a bucket has rows gone."""
        path = gone.buckets.get(bucket)
        if path is None:
            return GoneUsers.none(self.spec.columns.field("user_id").type)
        return self._gone_users(path)

    def _places(self, version: int, low: int, high: int) -> dict[int, dict[str, list[str]]]:
        """The paths of the files in the buckets `[low, high)`, by bucket and segment."""
        self.segments(version)
        files = self.files(version).select(["bucket", "segment", "path"])
        begin, end = np.searchsorted(files["bucket"].to_numpy(), [low, high]).tolist()
        found: dict[int, dict[str, list[str]]] = {}
        columns = (column.to_pylist() for column in files.slice(begin, end - begin).columns)
        for bucket, segment, path in zip(*columns, strict=True):
            found.setdefault(bucket, {}).setdefault(segment, []).append(path)
        return found

    def readers(
        self, version: int, bucket: int, segments: Iterable[str]
    ) -> list[tuple[str, SegmentReader]]:
        """(segment, reader) of those of these segments that have rows in a bucket, in the order of
        `segments`."""
        paths = self._places(version, bucket, bucket + 1).get(bucket, {})
        names = [name for name in segments if name in paths]
        readers = self._open_readers([paths[name] for name in names], version)
        return list(zip(names, readers, strict=True))

    def all_readers(
        self, version: int, segments: Iterable[str]
    ) -> Iterator[tuple[str, SegmentReader]]:
        """(segment, reader) of all buckets, segment by segment and bucket by bucket."""
        buckets = self._places(version, 0, self.spec.num_buckets)
        places = [
            (name, buckets[bucket][name])
            for name in segments
            for bucket in sorted(buckets)
            if name in buckets[bucket]
        ]
        for at in range(0, len(places), _FOOTERS_AT_ONCE):
            some = places[at : at + _FOOTERS_AT_ONCE]
            readers = self._open_readers([paths for _, paths in some], version)
            yield from ((name, reader) for (name, _), reader in zip(some, readers, strict=True))

    def _open_readers(self, places: Sequence[Sequence[str]], version: int) -> list[SegmentReader]:
        """The readers of some places, opened at the same time where each takes a round trip."""
        if not self.storage.fetches or len(places) < 2:
            return [self.reader(paths, version) for paths in places]
        with ThreadPoolExecutor(min(len(places), _FOOTERS_AT_ONCE)) as pool:
            return list(pool.map(lambda paths: self.reader(paths, version), places))

    def reader(self, paths: Sequence[str], version: int | None = None) -> SegmentReader:
        """The reader of the files of one segment and bucket: one file, unless another writer
        rewrote them. Readers of recent files are kept, they never go stale."""
        key = paths[0] if len(paths) == 1 else "\n".join(sorted(paths))
        found = self._readers.get(key)
        if found is None:
            found = self._open_reader(paths, version)
            if self._readers_bytes > _READER_CACHE_BYTES:
                self._readers, self._readers_bytes = {}, 0
            self._readers[key] = found
            self._readers_bytes += found.num_bytes
        return found

    def _open_reader(self, paths: Sequence[str], version: int | None) -> SegmentReader:
        if len(paths) == 1:
            try:
                found = SegmentReader(
                    self.storage, paths[0], version, self.stats, self.explain_missing
                )
                found.check_owner(self.table_id, self.spec.columns)
                return found
            except NoIndexError:
                pass
        # It reads the same way, as far as anybody here can tell.
        return cast(
            SegmentReader,
            ForeignReader(
                self.storage, paths, self.spec, version, self.stats, self.explain_missing
            ),
        )


def _by_place(files: pa.Table) -> pa.Table:
    """Sorted by bucket, segment and path."""
    segments = files["segment"].combine_chunks().dictionary_encode()
    names = np.array(segments.dictionary.to_pylist(), object)
    rank = np.argsort(np.argsort(names))
    places = files["bucket"].to_numpy().astype(np.int64) * max(len(names), 1)
    places += rank[segments.indices.to_numpy()] if len(names) else 0
    order = np.argsort(places, kind="stable")
    if (np.diff(places[order]) == 0).any():  # another writer's: several files in one place
        by = [("bucket", "ascending"), ("segment", "ascending"), ("path", "ascending")]
        return files.sort_by(by)
    return files.take(pa.array(order))
