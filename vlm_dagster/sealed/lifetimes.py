"""From which version to which a file belongs to a table: read from the log, every commit once.

Delta answers for one version at a time, and a table with a thousand pinned versions would take minutes
to ask. A file's lifetimes answer for all versions together: it is needed if, and only if, one of
them reaches into a version that is kept.

Where commits were cleaned away, what happened between is not known. A file is then taken to have lived
through all of the gap, so that nothing is let go on a guess.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from vlm_dagster.errors import TableError
from vlm_dagster.sealed.gone import GONE_ID
from vlm_dagster.sealed.retired import RETIRED_ID, Retired

if TYPE_CHECKING:
    from vlm_dagster.sealed.table import SealedTable

__all__ = ["Commit", "Kept", "Lifetimes"]

_COMMIT = re.compile(r"_delta_log/(\d{20})\.json")
_CHECKPOINT = re.compile(r"_delta_log/(\d{20})\.checkpoint(?:\.[^/]+)?\.parquet")
_FOLDERS = {GONE_ID: "_gone", RETIRED_ID: "_retired"}

FOREVER = 2**62


@dataclass(frozen=True)
class Commit:
    """One commit.

    Attributes:
        at_s: when it was written, UTC seconds; the later of what storage and the commit say.
        what: in few words what it did, e.g. "window 2025-01-01".
    """

    version: int
    at_s: float
    what: str


class Kept:
    """The versions that are not retired: those to keep, and all from some version on."""

    def __init__(self, retired: Retired) -> None:
        self._below = retired.below
        self._keep = sorted(retired.keep)

    def meet(self, spans: Iterable[tuple[int, int]]) -> bool:
        """Whether a kept version lies in one of these `[first, end)`."""
        for first, end in spans:
            if end > max(self._below, first):
                return True
            at = bisect_left(self._keep, first)
            if at < len(self._keep) and self._keep[at] < end:
                return True
        return False


class Lifetimes:
    """The lifetimes of every file that the log names, and of the sidecars that its transactions name.

    Attributes:
        newest: the version up to which the log was read.
        commits: by version, as far as they are still there.
        num_bytes: of every data file, as the log says.
        removed_s: by data file, when storage took the commit that last removed it, UTC seconds.
    """

    def __init__(self, table: SealedTable) -> None:
        """Read the log of a table up to its newest version.

        Raises:
            TableError: the log cannot be understood in full; nothing may be concluded from it then.
        """
        self._table = table
        self.newest = -1
        self.commits: dict[int, Commit] = {}
        self.num_bytes: dict[str, int] = {}
        self.removed_s: dict[str, float] = {}
        self._spans: dict[str, list[list[int]]] = {}
        self._sidecars: dict[str, list[list[int]]] = {}
        self._current: dict[str, str] = {}
        self._readable: list[list[int]] = []
        self._read_all()

    # -- answers --------------------------------------------------------------------------------

    def files(self) -> Iterator[tuple[str, list[tuple[int, int]]]]:
        """Every data file that was ever named, and its lifetimes `[first, end)` in versions."""
        for path, spans in self._spans.items():
            yield path, [(first, end) for first, end in spans]

    def of(self, path: str) -> list[tuple[int, int]]:
        """The lifetimes of a data file; none if no version named it."""
        return [(first, end) for first, end in self._spans.get(path, [])]

    def sidecars(self) -> dict[str, list[tuple[int, int]]]:
        """The lifetimes of sidecars that transactions name, by path."""
        return {path: [(a, b) for a, b in spans] for path, spans in self._sidecars.items()}

    def can_open(self, version: int) -> bool:
        """Whether the log of a version is still there."""
        return any(first <= version <= last for first, last in self._readable)

    # -- reading --------------------------------------------------------------------------------

    def _read_all(self) -> None:
        commits: dict[int, float] = {}
        checkpoints: dict[int, list[str]] = {}
        when: dict[int, float] = {}
        for info in self._table.storage.list("_delta_log"):
            if match := _COMMIT.fullmatch(info.path):
                commits[int(match[1])] = info.modified_s
            elif match := _CHECKPOINT.fullmatch(info.path):
                checkpoints.setdefault(int(match[1]), []).append(info.path)
                when[int(match[1])] = info.modified_s
        for version in sorted({*commits, *checkpoints}):
            if version in commits and version == self.newest + 1:
                self._apply(version, commits[version])
            elif version in checkpoints:
                if version != self.newest:
                    self._restart(version, sorted(checkpoints[version]), when[version])
                    if version in commits:
                        self._note(version, commits[version])
            elif version in commits:
                self._note(version, commits[version])
        self.advance()
        self._check()

    def advance(self) -> int:
        """Read what was committed since; returns the newest version."""
        while True:
            try:
                self._apply(self.newest + 1, 0.0)
            except FileNotFoundError:
                return self.newest

    def _actions(self, version: int) -> list[tuple[str, Any]]:
        raw = self._table.storage.read_bytes(f"_delta_log/{version:020d}.json")
        return [
            (kind, body)
            for line in raw.splitlines()
            if line
            for kind, body in json.loads(line).items()
        ]

    def _apply(self, version: int, modified_s: float) -> None:
        actions = self._actions(version)
        self.commits[version] = _commit(version, modified_s, actions)
        for kind, body in actions:
            if kind == "remove":
                path = unquote(body["path"])
                spans = self._spans.setdefault(path, [])
                if spans and spans[-1][1] == FOREVER:
                    spans[-1][1] = version
                else:  # its addition was cleaned away
                    spans.append([0, version])
                self.num_bytes.setdefault(path, body.get("size") or 0)
                self.removed_s[path] = modified_s
        # A commit may replace a file by itself, with other statistics: then it goes on.
        for kind, body in actions:
            if kind == "add":
                path = unquote(body["path"])
                self.num_bytes[path] = body["size"]
                spans = self._spans.setdefault(path, [])
                if not spans or spans[-1][1] != FOREVER:
                    spans.append([version, FOREVER])
        self._name_sidecars(
            version, {b["appId"]: b["version"] for kind, b in actions if kind == "txn"}, version
        )
        if self._readable and self._readable[-1][1] == version - 1:
            self._readable[-1][1] = version
        else:
            self._readable.append([version, version])
        self.newest = version

    def _restart(self, version: int, paths: list[str], modified_s: float) -> None:
        """Go on from a checkpoint, over commits that are not there any more."""
        first = self.newest + 1
        live: set[str] = set()
        transactions: dict[str, int] = {}
        for path in paths:
            with self._table.storage.open_input(path) as source:
                file = pq.ParquetFile(source)
                names = ["add.path", "add.size", "remove.path", "txn.appId", "txn.version"]
                actions = file.read(columns=names)
            for body in _present(actions, "add"):
                name = unquote(body["path"])
                live.add(name)
                self.num_bytes[name] = body["size"]
            for body in _present(actions, "remove"):
                name = unquote(body["path"])
                spans = self._spans.setdefault(name, [])
                if not spans or spans[-1][1] != FOREVER:
                    spans.append([first, version])
                self.num_bytes.setdefault(name, 0)
                self.removed_s[name] = modified_s
            for body in _present(actions, "txn", "appId"):
                transactions[body["appId"]] = body["version"]
        for name, spans in self._spans.items():
            if spans[-1][1] == FOREVER and name not in live:
                spans[-1][1] = version
                self.removed_s[name] = modified_s
        for name in live:
            spans = self._spans.setdefault(name, [])
            if not spans or spans[-1][1] != FOREVER:
                spans.append([first, FOREVER])
        self._name_sidecars(first, transactions, version)
        self._readable.append([version, version])
        self.newest = version

    def _note(self, version: int, modified_s: float) -> None:
        """A commit that stands alone tells when it was, but no version can be made of it."""
        self.commits[version] = _commit(version, modified_s, self._actions(version))

    def _name_sidecars(self, first: int, transactions: Mapping[str, int], version: int) -> None:
        for kind, folder in _FOLDERS.items():
            number = transactions.get(kind)
            if number is None:
                continue
            for app_id in transactions:
                if not app_id.startswith(f"{kind}/"):
                    continue
                _, edition, name = app_id.split("/", 2)
                path = f"{folder}/{name}"
                if int(edition) == number:
                    if self._current.get(kind) == path:
                        continue
                    if kind in self._current:
                        self._sidecars[self._current[kind]][-1][1] = version
                    self._current[kind] = path
                    self._sidecars.setdefault(path, []).append([first, FOREVER])
                elif path not in self._sidecars:
                    self._sidecars[path] = [[first, version]]

    def _check(self) -> None:
        """Deltalake must agree on what is live: a log that we misread must not cost a file."""
        live = {path for path, spans in self._spans.items() if spans[-1][1] == FOREVER}
        found = pa.table(self._table.handle(self.newest).get_add_actions(flatten=True))
        named = {unquote(path) for path in found["path"].to_pylist()}
        if live != named:
            raise TableError(
                self._table.uri,
                f"the log is not understood: at version {self.newest} it was read as naming "
                f"{len(live):,} files, but Delta finds {len(named):,}",
                "Another writer used features that this code does not know; upgrade vlm-dagster. "
                "Nothing was deleted.",
            )


def _commit(version: int, modified_s: float, actions: Iterable[tuple[str, Any]]) -> Commit:
    info: dict[str, Any] = next((body for kind, body in actions if kind == "commitInfo"), {})
    ours = [
        f"{name.removeprefix('vlm.').replace('_', ' ')} {value}"
        for name, value in sorted(info.items())
        if name.startswith("vlm.") and name not in ("vlm.digest", "vlm.num_rows", "vlm.by")
    ]
    by = f" by {info['vlm.by']}" if "vlm.by" in info else ""
    what = ", ".join(ours) + by if ours else str(info.get("operation", "unknown")).lower()
    written = info.get("timestamp", 0)
    at_s = written / 1000 if isinstance(written, (int, float)) else 0.0
    return Commit(version, max(modified_s, at_s), what)


def _present(actions: pa.Table, kind: str, key: str = "path") -> Iterator[dict[str, Any]]:
    if kind in actions.column_names:
        for body in actions.column(kind).to_pylist():
            if body is not None and body.get(key) is not None:
                yield body
