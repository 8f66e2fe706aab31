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
import operator
import re
import threading
from collections.abc import Callable, ItemsView, Iterator, Mapping, ValuesView
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, SupportsIndex

import pyarrow.compute as pc
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
    sealed: Mapping[int, SealedWindow]
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
        sealed = dict(self.sealed)
        index = self.start
        while index is not None and index in sealed:
            found.append(sealed[index])
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


class _SealedWindows(Mapping[int, SealedWindow]):
    """Windows by index, each read when it is asked for: sealing asks for one of thousands.

    Args:
        facts: their facts' ids, by segment name.
        read: gives the window of an id.
    """

    def __init__(
        self, facts: dict[str, str], grid: WindowGrid, read: Callable[[str], SealedWindow]
    ) -> None:
        self._facts = facts
        self._grid = grid
        self._read = read

    @cached_property
    def _by_index(self) -> dict[int, SealedWindow]:
        windows = map(self._read, self._facts.values())
        return {sealed.window.index: sealed for sealed in windows}

    def __contains__(self, index: object) -> bool:
        if not isinstance(index, SupportsIndex):
            return False
        return self._grid.at(operator.index(index)).segment in self._facts

    def __getitem__(self, index: int) -> SealedWindow:
        return self._read(self._facts[self._grid.at(index).segment])

    def __iter__(self) -> Iterator[int]:
        return iter(self._by_index)

    def items(self) -> ItemsView[int, SealedWindow]:
        return self._by_index.items()

    def values(self) -> ValuesView[SealedWindow]:
        return self._by_index.values()

    def __len__(self) -> int:
        return len(self._facts)


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

    def forget(self) -> None:
        """Everything that was read: the log is not the one that it was."""
        with self._lock:
            self._known = (-1, {})
            self._commits.clear()
            self._gone.clear()
            self._retired.clear()

    def transactions(self, version: int) -> dict[str, int]:
        """Application id -> version, as of a table version.

        Raises:
            FileNotFoundError: there is no such version, or its log was cleaned away.
        """
        with self._lock:
            known_version, known = self._known
        if known_version > version or known_version < 0:
            known_version, known = self._from_last_checkpoint(version)
        try:
            found = self._replayed(known_version, known, version)
        except FileNotFoundError:  # a cleanup took commits that a checkpoint stands for now
            found = self._replayed(*self._from_checkpoint(version), version)
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

    def _from_last_checkpoint(self, version: int) -> tuple[int, dict[str, int]]:
        """From the checkpoint that the log itself points at, which saves listing it; unless that is
        too new, gone, or of a kind that does not follow from its version."""
        try:
            hint = json.loads(self._storage.read_bytes("_delta_log/_last_checkpoint"))
            number = int(hint["version"])
            if number <= version and not {"parts", "v2Checkpoint"} & {
                key for key, value in hint.items() if value is not None
            }:
                return number, self._checkpointed(f"_delta_log/{number:020d}.checkpoint.parquet")
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass
        return self._from_checkpoint(version)

    def _from_checkpoint(self, version: int) -> tuple[int, dict[str, int]]:
        parts: dict[int, list[str]] = {}
        for info in self._storage.list("_delta_log"):
            match = _CHECKPOINT.fullmatch(info.path)
            if match and int(match[1]) <= version:
                parts.setdefault(int(match[1]), []).append(info.path)
        if not parts:
            return -1, {}
        newest = max(parts)
        found: dict[str, int] = {}
        for path in parts[newest]:
            found.update(self._checkpointed(path))
        return newest, found

    def _checkpointed(self, path: str) -> dict[str, int]:
        """The application transactions of one file of a checkpoint."""
        with self._storage.open_input(path) as source:
            actions = pq.ParquetFile(source).read(columns=["txn.appId", "txn.version"])
        found: dict[str, int] = {}
        for chunk in actions.column("txn").chunks:
            some = pc.is_valid(pc.struct_field(chunk, "appId"))
            ids, versions = (
                pc.struct_field(chunk, name).filter(some).to_pylist()
                for name in ("appId", "version")
            )
            found.update(zip(ids, versions, strict=True))
        return found

    def state(self, version: int, grid: WindowGrid, start: int | None) -> TableState:
        """What is sealed at a version. `start` is the declared first window, if any."""
        transactions = self.transactions(version)
        start = transactions.get(START_ID, start) if start is None else start
        facts: dict[str, str] = {}
        for app_id in transactions:
            if not app_id.startswith("vlm.facts/"):
                continue
            _, segment, revision, _ = app_id.split("/", 3)
            if transactions.get(f"vlm.window/{segment}") == int(revision):  # else superseded
                facts[segment] = app_id
        return TableState(
            version,
            grid,
            start,
            _SealedWindows(facts, grid, lambda app_id: self._window(app_id, grid)),
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
