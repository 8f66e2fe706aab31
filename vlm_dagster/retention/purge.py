"""The deleting half of retention: what only retired versions name goes, and nothing else.

A file is needed if one of its lifetimes reaches into a version that is not retired. Everything that is
committed from now on counts as such, so a file that comes back while this runs is spared: the log is
read again before every folder. What was put in place since it was last removed is spared too for a
day, as somebody may be about to commit it. Files that no version ever named are another job
(`sealed/sweep.py`), except sidecars, which may hold ids of erased users.

Killed anywhere, it has deleted some of these files; run again, it deletes the others. A sidecar that
leads to others goes after them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vlm_dagster.errors import StorageError
from vlm_dagster.sealed.lifetimes import Kept, Lifetimes
from vlm_dagster.sealed.retired import Retired
from vlm_dagster.sealed.sidecar import read_sidecar
from vlm_dagster.sealed.sweep import DEFAULT_GRACE_S
from vlm_dagster.sealed.table import SealedTable
from vlm_dagster.storage import FileInfo

__all__ = ["PurgeReport", "collectable", "purge"]

_GONE, _RETIRED = "_gone", "_retired"


@dataclass(frozen=True)
class PurgeReport:
    """What a purge deleted, or with `dry_run` would delete.

    Attributes:
        version: the newest version that it looked at.
        files: data files and sidecars, by path.
        num_spared: files that no kept version names, but that were put in place again lately.
    """

    version: int
    files: tuple[FileInfo, ...]
    num_spared: int
    dry_run: bool

    @property
    def num_files(self) -> int:
        return len(self.files)

    @property
    def num_bytes(self) -> int:
        return sum(info.size for info in self.files)


def purge(
    table: SealedTable,
    *,
    dry_run: bool = False,
    grace_s: float = DEFAULT_GRACE_S,
    at_once: Callable[[str], bool] = lambda path: False,
    progress: Callable[[FileInfo], None] | None = None,
) -> PurgeReport:
    """Delete every data file and sidecar that only retired versions name.

    Safe beside sealing, compaction and readers of versions that are kept. Retire versions first
    (`sealed.retired.retire`): those that are not retired keep all of their files.

    Args:
        grace_s: how long a file is spared that was put in place after it was last removed.
        at_once: tells of which of these files, by path, are not spared all the same.
        progress: called with every file when it is deleted.

    Raises:
        TableError: the log is not understood; nothing was deleted.
        StorageError: a file could not be deleted; run it again.
    """
    lifetimes = Lifetimes(table)
    retired = table.state(lifetimes.newest).retired
    spared = _Spared(lifetimes, grace_s, at_once)
    files, num_spared = collectable(table, lifetimes, retired, spared=spared)
    if not dry_run:
        files = _delete(table, lifetimes, Kept(retired), files, spared, progress)
    return PurgeReport(lifetimes.newest, tuple(files), num_spared, dry_run)


def collectable(
    table: SealedTable,
    lifetimes: Lifetimes,
    retired: Retired,
    *,
    grace_s: float = DEFAULT_GRACE_S,
    spared: _Spared | None = None,
) -> tuple[list[FileInfo], int]:
    """The files that are there and that no kept version needs, in the order in which to delete them;
    and how many more of them are spared because they are young."""
    kept = Kept(retired)
    spared = spared or _Spared(lifetimes, grace_s)
    found: list[FileInfo] = []
    num_spared = 0
    for info in table.storage.list():
        if not info.path.startswith("segment="):
            continue
        spans = lifetimes.of(info.path)
        if not spans or kept.meet(spans):
            continue
        if spared(info):
            num_spared += 1
        else:
            found.append(info)
    found.sort(key=lambda info: info.path)
    return [*found, *_sidecars(table, lifetimes, kept)], num_spared


class _Spared:
    """Tells of a file whether it was put in place again after the last commit that removed it, lately."""

    def __init__(
        self,
        lifetimes: Lifetimes,
        grace_s: float,
        at_once: Callable[[str], bool] = lambda path: False,
    ) -> None:
        self._lifetimes = lifetimes
        self._grace_s = grace_s
        self._at_once = at_once

    def __call__(self, info: FileInfo) -> bool:
        removed_s = self._lifetimes.removed_s.get(info.path, 0.0)
        came_back = info.modified_s > max(removed_s, time.time() - self._grace_s)
        return came_back and not self._at_once(info.path)


def _sidecars(table: SealedTable, lifetimes: Lifetimes, kept: Kept) -> list[FileInfo]:
    there = {info.path: info for folder in (_GONE, _RETIRED) for info in table.storage.list(folder)}
    named = lifetimes.sidecars()
    parts: dict[str, list[tuple[int, int]]] = {}
    for path, spans in named.items():
        if path.startswith(f"{_GONE}/") and path in there:
            for part in _parts(table, path):
                parts.setdefault(part, []).extend(spans)
    needed = {path for path, spans in (*named.items(), *parts.items()) if kept.meet(spans)}
    limit = time.time() - DEFAULT_GRACE_S
    dead = [
        info
        for path, info in there.items()
        if path not in needed
        # One that no commit ever named: its writer may be about to make that commit, and a table
        # whose newest ledger is missing cannot be read at all.
        and (path in named or path in parts or info.modified_s <= limit)
    ]
    # A ledger's edition says which other sidecars it needs, so it goes after them.
    return sorted(dead, key=lambda info: (info.path.endswith(".json"), info.path))


def _parts(table: SealedTable, path: str) -> list[str]:
    """The sidecars of its buckets that an edition of the ledger names."""
    return list(json.loads(read_sidecar(table.storage, path))["buckets"].values())


def _delete(
    table: SealedTable,
    lifetimes: Lifetimes,
    kept: Kept,
    files: Iterable[FileInfo],
    spared: _Spared,
    progress: Callable[[FileInfo], None] | None,
) -> list[FileInfo]:
    done: list[FileInfo] = []
    folders: dict[str, list[FileInfo]] = {}
    for info in files:
        folders.setdefault(info.path.rpartition("/")[0], []).append(info)
    for folder, wanted in folders.items():
        # Listed now: what was put in place again in the meantime is younger than it was.
        now = {info.path: info for info in table.storage.list(folder)}
        lifetimes.advance()
        if folder in (_GONE, _RETIRED):
            dead = {info.path for info in _sidecars(table, lifetimes, kept)}
        else:
            dead = {
                path
                for path, info in now.items()
                if not kept.meet(lifetimes.of(path)) and not spared(info)
            }
        for info in wanted:
            if info.path not in now or info.path not in dead:
                continue
            try:
                table.storage.delete(info.path)
            except OSError as error:
                raise StorageError(table.uri, f"deleting {info.path}", error) from error
            done.append(info)
            if progress is not None:
                progress(info)
    return done
