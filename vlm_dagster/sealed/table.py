"""A sealed table: windows of sorted rows, each committed at most once, under a lock in the log.

Sealing has two halves. `stage` sorts the rows and puts finished files in place, which nobody sees.
`commit` makes them visible in one Delta transaction that carries the window's lock: a
Delta application transaction. Of processes that race, the log lets exactly one through; the
others find the window sealed and compare digests.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction

from vlm_dagster.engines import Engine
from vlm_dagster.errors import (
    CorruptFileError,
    StorageError,
    TableError,
    WatermarkError,
    WindowError,
    WindowSealedError,
)
from vlm_dagster.hashing import Digest
from vlm_dagster.sealed.files import Extreme, SegmentReader, SegmentWriter, StagedFile, sha256_of
from vlm_dagster.sealed.log import (
    START_ID,
    LogReader,
    SealedWindow,
    TableState,
    facts_id,
    lock_id,
)
from vlm_dagster.storage import normalize_uri, open_storage
from vlm_dagster.windows import Window, WindowGrid, format_us

__all__ = ["TABLE_FORMAT", "Sealed", "SealedTable", "StagedWindow", "TableSpec", "table_kind"]

TABLE_FORMAT = 1
_MAX_COMMIT_TRIES = 50
_READER_CACHE_BYTES = 256 << 20
_CONFIGURATION = {
    # A backstop against other writers; the lock is what makes a window write-once.
    "delta.appendOnly": "true",
    # Pinned versions must stay readable, so nothing is cleaned away behind our back.
    "delta.enableExpiredLogCleanup": "false",
    "delta.logRetentionDuration": "interval 36500 days",
    "delta.deletedFileRetentionDuration": "interval 36500 days",
}

Progress = Callable[[int], None]


@dataclass(frozen=True)
class TableSpec:
    """What a sealed table is declared to hold; stored as JSON in the Delta table's description.

    Attributes:
        kind: "history" or "pointers".
        name: the table's name.
        columns: the stored columns without the partition columns; the first is `user_id`.
        sort_columns: the rows' order within a file: user, time, id.
        num_buckets: how many hash buckets of users.
        grid: the windows.
        start: the first window, or None: then the first window sealed is the first.
        details: what the owner of the table needs to open it again, JSON-able.
        extremes: what the files' indices keep about every user; follows from `details`.
    """

    kind: str
    name: str
    columns: pa.Schema
    sort_columns: tuple[str, str, str]
    num_buckets: int
    grid: WindowGrid
    start: Window | None
    details: dict[str, Any] = field(hash=False)
    extremes: tuple[Extreme, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "format": TABLE_FORMAT,
            "kind": self.kind,
            "num_buckets": self.num_buckets,
            "windows": self.grid.cadence,
            "start": self.start.key if self.start else None,
            **self.details,
        }

    @property
    def delta_schema(self) -> pa.Schema:
        return pa.schema(
            [*self.columns, pa.field("segment", pa.string()), pa.field("bucket", pa.int32())]
        )


@dataclass(frozen=True)
class StagedWindow:
    """Files that are in place but not committed. Picklable; holds no credentials.

    Attributes:
        already_sealed: the window was sealed before staging began, so no files were written:
            committing compares the digests.
    """

    uri: str
    table_id: str
    window: Window
    digest: str
    num_rows: int
    num_users: int
    num_duplicates: int
    files: tuple[StagedFile, ...]
    facts: dict[str, Any]
    already_sealed: bool

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Sealed:
    """The outcome of sealing.

    Attributes:
        version: the Delta version that sealed the window (an earlier one if it was reused).
        digest: the digest of the window's content.
        reused: the window was sealed already, with the same content; nothing was changed.
        num_duplicates: rows dropped as duplicates under the declared policy.
        num_bytes: of the files written now; 0 if reused.
    """

    window: Window
    version: int
    digest: str
    num_events: int
    num_users: int
    num_duplicates: int
    num_bytes: int
    reused: bool


def _hidden(options: Mapping[str, str] | None) -> dict[str, str] | None:
    return dict(options) if options else None


class SealedTable:
    """One sealed table. Histories and pointer datasets own one each; users do not meet it."""

    def __init__(
        self,
        uri: str,
        spec: TableSpec,
        table_id: str,
        storage_options: Mapping[str, str] | None,
    ) -> None:
        self.uri = uri
        self.spec = spec
        self.table_id = table_id
        self.storage = open_storage(uri, storage_options)
        self.storage_options = _hidden(storage_options)
        self._log = LogReader(self.storage)
        self._readers: dict[str, SegmentReader] = {}
        self._readers_bytes = 0
        self._files = lru_cache(maxsize=4)(self._load_files)
        self._buckets = lru_cache(maxsize=4)(self._load_buckets)

    # -- opening ------------------------------------------------------------------------------

    @classmethod
    def create(cls, uri: str, spec: TableSpec, options: Mapping[str, str] | None) -> SealedTable:
        """Create the table, or open it if it is there with the same declaration."""
        uri = normalize_uri(uri)
        for attempt in range(_MAX_COMMIT_TRIES):
            try:
                DeltaTable.create(
                    uri,
                    schema=spec.delta_schema,
                    mode="ignore",
                    partition_by=["segment", "bucket"],
                    name=spec.name,
                    description=json.dumps({"vlm": spec.to_json()}, sort_keys=True),
                    configuration=dict(_CONFIGURATION),
                    storage_options=_hidden(options),
                )
                break
            except CommitFailedError:  # somebody else created it at the same instant
                time.sleep(0.01 * attempt)
            except (DeltaError, OSError) as error:
                raise StorageError(uri, "creating the table", error) from error
        declared, table_id = _read_declaration(uri, spec.kind, options)
        wanted = spec.to_json()
        for name in sorted({*declared, *wanted}):
            if declared.get(name) != wanted.get(name):
                raise TableError(
                    uri,
                    f"the table was created with {name} = {declared.get(name)!r}, not "
                    f"{wanted.get(name)!r}",
                    "Open it with `open`, declare the same values, or create a new table.",
                )
        return cls(uri, spec, table_id, options)

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
        declared, table_id = _read_declaration(uri, kind, options)
        return cls(uri, revive(declared), table_id, options)

    def handle(self, version: int | None = None) -> DeltaTable:
        """A Delta handle at a version (the newest if None), checked to be this very table."""
        handle = _open_delta(self.uri, version, self.storage_options)
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
        at = int(self.handle(version).version())
        return self._log.state(at, self.spec.grid, self._declared_start)

    @property
    def _declared_start(self) -> int | None:
        return self.spec.start.index if self.spec.start else None

    # -- sealing ------------------------------------------------------------------------------

    def check_window(self, key: str | Window, state: TableState) -> Window:
        """The window of a key, if the table can take it."""
        window = self.spec.grid.parse(key)
        if state.start is not None and window.index < state.start:
            first = self.spec.grid.at(state.start).key
            raise WindowError(
                window.key,
                f"lies before the first window {first} of {self.uri}",
                "Positions count from the first window, so earlier ones cannot be added: create "
                f"a table with start={window.key!r}.",
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
    ) -> StagedWindow:
        """Sort rows into files and put these in place, uncommitted.

        Args:
            rows: validated rows, of `schema` plus `bucket` (int32) and `row` (int64, the number
                of the row in the input, from 0).
            finish: turns the rows, sorted by (`bucket`, the table's sort columns as far as the rows
                have them, `row`) in chunks that hold users whole, into rows as stored plus
                `bucket`, in the table's order.
            facts: what to record beside the digest.
            counts: asked at the end for what was counted on the way, e.g. {"num_duplicates": 3}.
        """
        dry = window.index in state.sealed
        incoming = pa.schema([*schema, pa.field("bucket", pa.int32()), pa.field("row", pa.int64())])
        by = ["bucket", *(c for c in self.spec.sort_columns if c in schema.names), "row"]
        with self.storage.scratch() as scratch:
            ordered = engine.sort(rows, incoming, by, scratch)
            try:
                files, digest, num_users = self._write(
                    window, finish(_whole_users(ordered)), scratch, dry
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

    def _write(
        self, window: Window, rows: Iterator[pa.RecordBatch], scratch: Path, dry: bool
    ) -> tuple[list[StagedFile], Digest, int]:
        # Files go into place only when all are finished: rows may be refused up to the last one.
        finished: list[tuple[Path, StagedFile]] = []
        digest = Digest()
        num_users = 0
        writer: SegmentWriter | None = None
        current = -1

        def close() -> None:
            nonlocal digest, num_users
            assert writer is not None
            stats = writer.close()
            digest = digest + writer.digest
            num_users += writer.num_users
            local = scratch / f"{current}.parquet"
            if dry:
                local.unlink()
                return
            path = f"segment={window.segment}/bucket={current}/{sha256_of(local)}.parquet"
            size = local.stat().st_size
            finished.append((local, StagedFile(path, size, current, writer.num_rows, stats)))

        try:
            for batch in rows:
                buckets = batch.column("bucket").to_numpy()
                edges = np.flatnonzero(np.diff(buckets)) + 1
                for start, end in zip([0, *edges], [*edges, len(buckets)], strict=True):
                    if end == start:
                        continue  # a chunk whose rows were all dropped
                    if buckets[start] != current:
                        if writer is not None:
                            close()
                        current = int(buckets[start])
                        header = {
                            "kind": self.spec.kind,
                            "table_id": self.table_id,
                            "name": self.spec.name,
                            "window": window.key,
                            "bucket": current,
                        }
                        writer = SegmentWriter(
                            scratch / f"{current}.parquet",
                            self.spec.columns,
                            header,
                            self.spec.sort_columns,
                            self.spec.extremes,
                        )
                    assert writer is not None
                    writer.write(batch.slice(start, end - start))
            if writer is not None:
                close()
        except BaseException:
            if writer is not None:
                with contextlib.suppress(OSError):  # what went wrong before matters more
                    writer.abandon()
            raise
        for local, file in finished:
            self.storage.put(local, file.path)
        return [file for _, file in finished], digest, num_users

    def commit(self, staged: StagedWindow) -> Sealed:
        """Make a staged window visible: at most once, whoever else tries at the same time.

        Raises:
            WindowSealedError: it is sealed with other content.
            CorruptFileError: a staged file is gone.
            StorageError: the commit could not be written.
        """
        if staged.table_id != self.table_id:
            raise TableError(
                self.uri,
                f"the window was staged for table {staged.table_id}, but this is {self.table_id}",
                "Stage it again.",
            )
        window = staged.window
        problem: BaseException | None = None
        for attempt in range(_MAX_COMMIT_TRIES):
            handle = self.handle()
            state = self._log.state(int(handle.version()), self.spec.grid, self._declared_start)
            if window.index in state.sealed:
                return self._reuse(staged, state.sealed[window.index])
            self.check_window(window, state)
            if staged.already_sealed:
                raise TableError(
                    self.uri,
                    f"window {window.key} was sealed when it was staged, but is not any more",
                    "Stage it again.",
                )
            self._check_in_place(staged)
            try:
                self._commit_once(handle, staged, state)
            except CommitFailedError as error:
                # Somebody committed since the handle was opened: look again.
                problem = error
                time.sleep(min(0.002 * 2**attempt, 0.25))
                continue
            except (DeltaError, OSError) as error:
                raise StorageError(self.uri, f"committing window {window.key}", error) from error
            return self._committed(staged, int(handle.version()))
        raise StorageError(
            self.uri,
            f"committing window {window.key} ({_MAX_COMMIT_TRIES} tries, others kept winning)",
            problem or RuntimeError("no try was made"),
        )

    def _commit_once(self, handle: DeltaTable, staged: StagedWindow, state: TableState) -> None:
        window = staged.window
        facts = {"key": window.key, "digest": staged.digest, **staged.facts}
        locks = [Transaction(lock_id(window), 1), Transaction(facts_id(window, 1, facts), 1)]
        if state.start is None:
            locks.append(Transaction(START_ID, window.index))
        now_ms = int(time.time() * 1000)
        handle.create_write_transaction(
            [
                AddAction(
                    file.path,
                    file.size,
                    {"segment": window.segment, "bucket": str(file.bucket)},
                    now_ms,
                    True,
                    file.stats,
                )
                for file in staged.files
            ],
            "append",
            self.spec.delta_schema,
            ["segment", "bucket"],
            commit_properties=CommitProperties(
                app_transactions=locks,
                custom_metadata={
                    "vlm.window": window.key,
                    "vlm.digest": staged.digest,
                    "vlm.num_rows": str(staged.num_rows),
                },
            ),
        )

    def _check_in_place(self, staged: StagedWindow) -> None:
        # The Delta commit does not look whether its files exist.
        for file in staged.files:
            size = self.storage.size(file.path)
            if size != file.size:
                found = "is missing" if size is None else f"has {size} bytes, not {file.size}"
                raise CorruptFileError(
                    table=self.uri,
                    path=file.path,
                    version=None,
                    problem=f"{found}, so window {staged.window.key} was not committed",
                )

    def _committed(self, staged: StagedWindow, base: int) -> Sealed:
        lock = lock_id(staged.window)
        for version, transactions in self._log.commits_after(base):
            if lock in transactions:
                return self._sealed(staged, version, staged.digest, reused=False)
        raise AssertionError(f"{self.uri}: the commit of {lock} is not in the log")

    def _reuse(self, staged: StagedWindow, found: SealedWindow) -> Sealed:
        if found.digest != staged.digest:
            raise WindowSealedError(
                table=self.uri,
                window=found.window.key,
                sealed=found.digest,
                offered=staged.digest,
            )
        return self._sealed(staged, self.version_sealing(found.window), found.digest, reused=True)

    def _sealed(self, staged: StagedWindow, version: int, digest: str, reused: bool) -> Sealed:
        return Sealed(
            window=staged.window,
            version=version,
            digest=digest,
            num_events=staged.num_rows,
            num_users=staged.num_users,
            num_duplicates=staged.num_duplicates,
            num_bytes=0 if reused else staged.num_bytes,
            reused=reused,
        )

    # -- versions -----------------------------------------------------------------------------

    def version_sealing(self, window: Window) -> int:
        """The version that sealed a window."""
        return self._first_version(
            lambda state: window.index in state.sealed, f"window {window.key}", window
        )

    def version_covering(self, window: Window) -> int:
        """The first version whose watermark covers a window: it, and all before it, are sealed
        there. A fact of the log, so it never changes.

        Raises:
            WatermarkError: no version covers it yet.
        """
        return self._first_version(
            lambda state: state.covers(window), f"window {window.key}", window
        )

    def versions_sealing(self, windows: Collection[Window]) -> dict[str, int]:
        """`version_sealing` of many windows, by key, with each commit read once."""
        sealed_in = self._sealed_in()
        found: dict[str, int] = {}
        for window in windows:
            version = sealed_in.get(window.index)
            found[window.key] = self.version_sealing(window) if version is None else version
        return found

    def versions_covering(self, windows: Collection[Window]) -> dict[str, int]:
        """`version_covering` of many windows, by key, with each commit read once.

        Raises:
            WatermarkError: one of them is not covered yet.
        """
        state = self.state()
        wanted = {window.index for window in windows}
        sealed_in = self._sealed_in()
        found: dict[str, int] = {}
        newest = 0
        for sealed in state.covered:
            index = sealed.window.index
            if index not in sealed_in:  # the log's beginning was cleaned away
                found.clear()
                break
            newest = max(newest, sealed_in[index])
            if index in wanted:
                found[sealed.window.key] = newest
        for window in sorted(windows):
            if window.key not in found:
                found[window.key] = self.version_covering(window)
        return found

    def _sealed_in(self) -> dict[int, int]:
        """Window index -> the version that sealed it, as far as the commits are still there."""
        locks = {lock_id(s.window): index for index, s in self.state().sealed.items()}
        found: dict[int, int] = {}
        for version, transactions in self._log.commits_after(-1):
            for app_id in transactions:
                if app_id in locks:
                    found.setdefault(locks[app_id], version)
        return found

    def _first_version(
        self, holds: Callable[[TableState], bool], asked: str, window: Window
    ) -> int:
        def at(version: int) -> TableState:
            return self._log.state(version, self.spec.grid, self._declared_start)

        newest = int(self.handle().version())
        state = at(newest)
        if not holds(state):
            mark = state.watermark_us
            raise WatermarkError(
                table=self.uri,
                version=newest,
                watermark="(nothing sealed)" if mark is None else format_us(mark),
                asked=asked,
                missing=[w.key for w in state.missing_through(window)],
            )
        # Both conditions, once true, stay true: windows are never unsealed. A version whose log was
        # cleaned away is older than all that remain, and nobody can pin it: it does not count.
        low, high = 0, newest
        while low < high:
            middle = (low + high) // 2
            try:
                found = holds(at(middle))
            except FileNotFoundError:
                found = False
            if found:
                high = middle
            else:
                low = middle + 1
        return low

    # -- reading ------------------------------------------------------------------------------

    def files(self, version: int) -> pa.Table:
        """The live files at a version: path, segment, bucket, num_rows, size_bytes."""
        return self._files(version)

    def _load_files(self, version: int) -> pa.Table:
        actions = pa.table(self.handle(version).get_add_actions(flatten=True))
        return pa.table(
            {
                "path": actions["path"].cast(pa.string()),
                "segment": actions["partition.segment"].cast(pa.string()),
                "bucket": actions["partition.bucket"].cast(pa.int32()),
                "num_rows": actions["num_records"].cast(pa.int64()),
                "size_bytes": actions["size_bytes"].cast(pa.int64()),
            }
        ).sort_by([("bucket", "ascending"), ("segment", "ascending"), ("path", "ascending")])

    def files_of_bucket(self, version: int, bucket: int) -> list[tuple[str, str]]:
        """The live files of one bucket: (segment, path) each."""
        return self._buckets(version).get(bucket, [])

    def _load_buckets(self, version: int) -> dict[int, list[tuple[str, str]]]:
        found: dict[int, list[tuple[str, str]]] = {}
        files = self.files(version).select(["bucket", "segment", "path"])
        for bucket, segment, path in zip(*(c.to_pylist() for c in files.columns), strict=True):
            found.setdefault(bucket, []).append((segment, path))
        return found

    def paths(self, version: int, bucket: int, segments: Sequence[str]) -> list[str]:
        """The files of a bucket in these segments, in the order of `segments`."""
        by_segment: dict[str, list[str]] = {}
        for segment, path in self.files_of_bucket(version, bucket):
            by_segment.setdefault(segment, []).append(path)
        return [path for segment in segments for path in by_segment.get(segment, [])]

    def reader(self, path: str, version: int | None = None) -> SegmentReader:
        """The reader of one file; readers of recent files are kept, they never go stale."""
        found = self._readers.get(path)
        if found is None:
            found = SegmentReader(self.storage, path, version)
            if self._readers_bytes > _READER_CACHE_BYTES:
                self._readers, self._readers_bytes = {}, 0
            self._readers[path] = found
            self._readers_bytes += found.num_bytes
        return found


def _whole_users(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Re-cut a sorted stream so that no user's rows are spread over two chunks."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        users = batch.column("user_id")
        last = users[-1]
        if held and held[-1].column("user_id")[-1] == last:
            held.append(batch)  # the whole batch is one user's, who goes on
            if users[0] != last:
                raise AssertionError("rows are not sorted by user")
            continue
        cut = int(pc.index(users, last).as_py())
        if held or cut:
            yield _joined([*held, batch.slice(0, cut)])
        held = [batch.slice(cut)]
    if held:
        yield _joined(held)


def _joined(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    if len(batches) == 1:
        return batches[0]
    return pa.concat_batches(batches)


def _open_delta(uri: str, version: int | None, options: Mapping[str, str] | None) -> DeltaTable:
    if version is not None and (not isinstance(version, int) or version < 0):
        raise TableError(uri, f"version {version!r} is not a number from 0", "Give one, or None.")
    try:
        return DeltaTable(uri, version=version, storage_options=_hidden(options))
    except TableNotFoundError:
        if version is not None and DeltaTable.is_deltatable(uri, _hidden(options)):
            raise TableError(
                uri,
                f"version {version} can no longer be opened",
                "Its log was cleaned away, or never existed; use a version that "
                f"`vlm-dagster inspect {uri}` lists.",
            ) from None
        raise TableError(
            uri, "there is no Delta table here", "Check the address, or create the table first."
        ) from None
    except DeltaError as error:
        if version is None:
            raise TableError(
                uri, f"the table cannot be opened ({error})", "Repair its log."
            ) from error
        raise TableError(
            uri,
            f"version {version} cannot be opened ({error})",
            f"Use a version that `vlm-dagster inspect {uri}` lists.",
        ) from error
    except OSError as error:
        raise StorageError(uri, "opening the table", error) from error


def table_kind(uri: str, options: Mapping[str, str] | None) -> str:
    """What kind of sealed table lies there: "history" or "pointers"; TableError if none does."""
    declared, _ = _read_any_declaration(uri, options)
    return str(declared["kind"])


def _read_declaration(
    uri: str, kind: str, options: Mapping[str, str] | None
) -> tuple[dict[str, Any], str]:
    declared, table_id = _read_any_declaration(uri, options)
    if declared["kind"] != kind:
        raise TableError(
            uri,
            f"this is a {declared['kind']} table, not a {kind} table",
            "Open it with the class of its own kind.",
        )
    return declared, table_id


def _read_any_declaration(
    uri: str, options: Mapping[str, str] | None
) -> tuple[dict[str, Any], str]:
    metadata = _open_delta(uri, None, options).metadata()
    try:
        declared = json.loads(metadata.description or "")["vlm"]
        number, _ = int(declared["format"]), declared["kind"]
    except (ValueError, KeyError, TypeError):
        raise TableError(
            uri,
            "this Delta table is not one of ours (its description does not declare it)",
            "Give the address of a table that vlm-dagster created.",
        ) from None
    if number > TABLE_FORMAT:
        raise TableError(
            uri,
            f"the table has format {number}, newer than this code's {TABLE_FORMAT}",
            "Upgrade vlm-dagster.",
        )
    return declared, str(metadata.id)
