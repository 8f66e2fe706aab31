"""What is sealed, read from the application transactions of a Delta log.

deltalake answers for one application id at a time, each time from the log; a table with a thousand
windows needs them all, at any version. So this reads the `txn` actions itself: those of the newest
checkpoint at or before the version, then those of the commits since. They survive checkpoints and log
cleanup, as `history()` does not.

Ids (`SEG` is the window's key as a partition value):

- `vlm.window/SEG`: the lock of a window; its version is the revision, 1 when first sealed.
- `vlm.facts/SEG/REVISION/JSON`: what was sealed: key, digest, counts, and a pointer window's pins.
- `vlm.start`: the index of the first window, where it was not declared at creation.
- `vlm.layout`: how often files were replaced by others (layout.py).
- `vlm.gone`, `vlm.gone/EDITION/NAME`: the ledger of rows that left since (gone.py).
- `vlm.retired`, `vlm.retired/NUMBER/NAME`: versions that are not kept any more (retired.py).
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow.parquet as pq

from vlm_dagster.hashing import Digest
from vlm_dagster.sealed.gone import GONE_ID, Gone, read_gone
from vlm_dagster.sealed.retired import RETIRED_ID, Retired, read_retired
from vlm_dagster.storage import Storage
from vlm_dagster.windows import Window, WindowGrid

__all__ = ["LogReader", "SealedWindow", "TableState", "facts_id", "lock_id"]

START_ID = "vlm.start"
LAYOUT_ID = "vlm.layout"
_COMMIT = re.compile(r"_delta_log/(\d{20})\.json")
_CHECKPOINT = re.compile(r"_delta_log/(\d{20})\.checkpoint(?:\.[^/]+)?\.parquet")


def lock_id(window: Window) -> str:
    return f"vlm.window/{window.segment}"


def facts_id(window: Window, revision: int, facts: dict[str, Any]) -> str:
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return f"vlm.facts/{window.segment}/{revision}/{text}"


@dataclass(frozen=True)
class SealedWindow:
    """A window as sealed: the digest of its rows, how many, and what else was recorded.

    Attributes:
        revision: 1 as first sealed, one more with every correction.
    """

    window: Window
    digest: str
    num_rows: int
    facts: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)
    revision: int = 1

    @property
    def num_events(self) -> int:
        return self.num_rows

    def holds(self, digest: str, state: TableState) -> bool:
        """Whether a digest is that of its content, with or without the rows that left since: a
        source from which erased users were removed still gives the same window."""
        return digest in (self.digest, str(state.left(self.window.index)))


@dataclass(frozen=True)
class TableState:
    """What is sealed at a version, by window index, and what has left since.

    Attributes:
        start: the first window that counts.
        load_gone, load_retired: read the sidecars behind `gone` and `retired`, when these are asked
            for: those of versions that are not kept may have been deleted.
    """

    version: int
    grid: WindowGrid
    start: int | None
    sealed: dict[int, SealedWindow]
    load_gone: Callable[[], Gone] = field(default=Gone, hash=False, compare=False)
    load_retired: Callable[[], Retired] = field(default=Retired, hash=False, compare=False)

    @cached_property
    def gone(self) -> Gone:
        """Rows that were sealed and are not there any more."""
        return self.load_gone()

    @cached_property
    def retired(self) -> Retired:
        """The versions that are not kept any more."""
        return self.load_retired()

    def left(self, index: int) -> Digest:
        """The digest of the rows of a sealed window that the files of this version hold."""
        sealed = self.sealed[index]
        return Digest.parse(sealed.digest) - self.gone.of(sealed.window.segment, sealed.revision)

    @cached_property
    def covered(self) -> list[SealedWindow]:
        """The sealed windows from the start up to the first gap, oldest first."""
        found: list[SealedWindow] = []
        index = self.start
        while index is not None and index in self.sealed:
            found.append(self.sealed[index])
            index += 1
        return found

    @property
    def watermark_us(self) -> int | None:
        """The end of the last covered window; where nothing is covered, the start; None if
        there is no start either."""
        if self.covered:
            return self.covered[-1].window.end_us
        return None if self.start is None else self.grid.at(self.start).start_us

    def missing_through(self, window: Window) -> list[Window]:
        """The windows from the start through `window` that are not sealed."""
        if self.start is None:
            return [window]
        indices = range(self.start, window.index + 1)
        return [self.grid.at(i) for i in indices if i not in self.sealed]

    def covers(self, window: Window) -> bool:
        return (
            self.start is not None
            and self.start <= window.index
            and window.index < self.start + len(self.covered)
        )


class LogReader:
    """Reads the application transactions of one table, remembering what it has read.

    Commits never change, so what was read once stays true for this table (not for another one
    created later at the same place: make a new reader then).
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._known: tuple[int, dict[str, int]] = (-1, {})
        self._commits: dict[int, dict[str, int]] = {}
        self._windows: dict[str, SealedWindow] = {}
        self._gone: dict[int, Gone] = {}
        self._retired: dict[int, Retired] = {}
        self._lock = threading.Lock()

    def transactions(self, version: int) -> dict[str, int]:
        """Application id -> version, as of a table version.

        Raises:
            FileNotFoundError: there is no such version, or its log was cleaned away.
        """
        with self._lock:
            known_version, known = self._known
        if known_version > version or known_version < 0:
            known_version, known = self._from_checkpoint(version)
        try:
            found = self._replayed(known_version, known, version)
        except FileNotFoundError:  # a cleanup took commits that a checkpoint stands for now
            found = self._replayed(*self._from_checkpoint(version, listed=True), version)
        with self._lock:
            if version >= self._known[0]:
                self._known = (version, found)
        return dict(found)

    def _replayed(self, base: int, known: dict[str, int], version: int) -> dict[str, int]:
        found = dict(known)
        for commit in range(base + 1, version + 1):
            found.update(self.commit(commit))
        return found

    def commit(self, version: int) -> dict[str, int]:
        """The application transactions of one commit. FileNotFoundError if there is none."""
        if version in self._commits:
            return self._commits[version]
        raw = self._storage.read_bytes(f"_delta_log/{version:020d}.json")
        actions = (json.loads(line) for line in raw.splitlines() if line.startswith(b'{"txn"'))
        found = {a["txn"]["appId"]: a["txn"]["version"] for a in actions}
        self._commits[version] = found
        return found

    def commits_after(self, version: int) -> Iterator[tuple[int, dict[str, int]]]:
        """The commits after a version, oldest first, as far as there are any."""
        while True:
            version += 1
            try:
                found = self.commit(version)
            except FileNotFoundError:
                return
            yield version, found

    def _from_checkpoint(self, version: int, *, listed: bool = False) -> tuple[int, dict[str, int]]:
        """What a checkpoint at or before a version says: the one that the log's hint names, or, if
        that is a later one or `listed`, the newest there is."""
        newest, paths = (-1, []) if listed else self._hinted(version)
        if not paths:
            newest, paths = self._listed(version)
        found: dict[str, int] = {}
        for path in paths:
            with self._storage.open_input(path) as source:
                # Not `read_table`, which imports all of pyarrow's dataset machinery first.
                table = pq.ParquetFile(source).read(columns=["txn"])
            for action in table.column("txn").drop_null().to_pylist():
                if action["appId"] is not None:
                    found[action["appId"]] = action["version"]
        return newest, found

    def _hinted(self, version: int) -> tuple[int, list[str]]:
        """Delta's `_last_checkpoint`: one small file, where a listing is a request a thousand commits.
        It may be behind; then more commits are replayed."""
        try:
            hint = json.loads(self._storage.read_bytes("_delta_log/_last_checkpoint"))
            number = int(hint["version"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return -1, []
        path = f"_delta_log/{number:020d}.checkpoint.parquet"
        if number > version or hint.get("parts") or self._storage.size(path) is None:
            return -1, []
        return number, [path]

    def _listed(self, version: int) -> tuple[int, list[str]]:
        parts: dict[int, list[str]] = {}
        for info in self._storage.list("_delta_log"):
            match = _CHECKPOINT.fullmatch(info.path)
            if match and int(match[1]) <= version:
                parts.setdefault(int(match[1]), []).append(info.path)
        newest = max(parts, default=-1)
        return newest, parts.get(newest, [])

    def state(self, version: int, grid: WindowGrid, start: int | None) -> TableState:
        """What is sealed at a version. `start` is the declared first window, if any."""
        transactions = self.transactions(version)
        start = transactions.get(START_ID, start) if start is None else start
        sealed: dict[int, SealedWindow] = {}
        for app_id in transactions:
            if not app_id.startswith("vlm.facts/"):
                continue
            _, segment, revision, _ = app_id.split("/", 3)
            if transactions.get(f"vlm.window/{segment}") == int(revision):  # else superseded
                found = self._window(app_id, grid)
                sealed[found.window.index] = found
        return TableState(
            version,
            grid,
            start,
            sealed,
            load_gone=lambda: self._gone_at(transactions),
            load_retired=lambda: self._retired_at(transactions),
        )

    def _gone_at(self, transactions: dict[str, int]) -> Gone:
        """The ledger; each edition is read once."""
        edition = transactions.get(GONE_ID, 0)
        if edition not in self._gone:
            self._gone[edition] = read_gone(self._storage, transactions)
        return self._gone[edition]

    def _retired_at(self, transactions: dict[str, int]) -> Retired:
        number = transactions.get(RETIRED_ID, 0)
        if number not in self._retired:
            self._retired[number] = read_retired(self._storage, transactions)
        return self._retired[number]

    def _window(self, app_id: str, grid: WindowGrid) -> SealedWindow:
        found = self._windows.get(app_id)
        if found is None:
            facts = json.loads(app_id.split("/", 3)[3])
            digest = Digest.parse(facts["digest"])
            window = grid.parse(facts["key"])
            revision = int(app_id.split("/", 3)[2])
            found = SealedWindow(window, str(digest), digest.num_rows, facts, revision)
            self._windows[app_id] = found
        return found
