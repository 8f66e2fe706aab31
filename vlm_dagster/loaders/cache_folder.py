"""The folder of a cache: homes of units, one for all that decides what is in them.

    FOLDER/DIGEST.vlm-units/facts.json    which tables and columns the units were read from
    FOLDER/DIGEST.vlm-units/KEY.unit      a unit
    FOLDER/DIGEST.vlm-units/*.tmp         one that is being written
    FOLDER/*.vlm-gone                     a home that is being deleted

Who opens a cache first makes its home, which says what it knows of erasures, and then looks at the
others': so of two that open it at the same time, the one that knows less sees the other's, or has its
home seen and deleted. A home goes in one step, by a new name: who was writing there finds no folder
any more, and stops.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vlm_dagster.errors import StorageError
from vlm_dagster.loaders.cache_facts import CacheFacts

__all__ = ["CacheFolder", "Entry", "clear_cache"]

_HOME = ".vlm-units"
_GONE = ".vlm-gone"
_FACTS = "facts.json"
_SUFFIX = ".unit"
_UNFINISHED = ".tmp"
# Writing a unit takes milliseconds: whoever began so long ago was killed.
_UNFINISHED_S = 900.0
_MOST_CLEARINGS = 100
_TRIES = 10


class Entry(NamedTuple):
    """A unit's file, in order of its last use."""

    used_s: float
    path: str
    num_bytes: int


class CacheFolder:
    """A folder as one cache sees it; opening makes its home and deletes what may not be kept.

    Attributes:
        is_outdated: whether the folder knows of an erasure that `facts` do not: nothing may be put
            there then.

    Raises:
        OSError: it cannot be made or listed.
    """

    def __init__(self, root: str | os.PathLike[str], facts: CacheFacts) -> None:
        self.root = Path(root).absolute()
        self._home = self.root / f"{facts.digest}{_HOME}"
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._make_home(facts)
        known = [_facts_of(home) for home in _homes(self.root)]
        self.is_outdated = any(CacheFacts.outdated(facts.to_json(), other) for other in known)
        if self.is_outdated:
            _delete(self._home)
        self._sweep(facts)

    def path_of(self, key: bytes) -> Path:
        """Where a unit stands."""
        return self._home / f"{key.hex()}{_SUFFIX}"

    def unfinished(self) -> Path:
        """A name for a unit that is being written."""
        return self._home / f"{uuid.uuid4().hex}{_UNFINISHED}"

    @property
    def is_gone(self) -> bool:
        """Whether somebody deleted the home since."""
        return not self._home.is_dir()

    def entries(self) -> list[Entry]:
        """All units of all homes, the longest unused first."""
        return sorted(_entries(self.root))

    def _make_home(self, facts: CacheFacts) -> None:
        """There may be one. If others delete it meanwhile, it is not made again."""
        with contextlib.suppress(FileExistsError):
            self._home.mkdir(mode=0o700)
        if _facts_of(self._home) is not None:
            return
        unfinished = self.unfinished()
        with contextlib.suppress(FileNotFoundError):
            with open(unfinished, "x", opener=_private) as file:
                json.dump({"vlm_units": 1, **facts.to_json()}, file, indent=1)
            unfinished.replace(self._home / _FACTS)

    def _sweep(self, facts: CacheFacts) -> None:
        """Delete what killed processes left, and what is of before an erasure that `facts` know of."""
        before = time.time() - _UNFINISHED_S
        for gone in self.root.glob(f"*{_GONE}"):
            _delete(gone)
        for home in _homes(self.root):
            with contextlib.suppress(OSError):
                known = _facts_of(home)
                if known is None and home.stat().st_mtime > before:
                    continue  # somebody is about to write them
                if known is None or CacheFacts.outdated(known, facts.to_json()):
                    _delete(home)
                    continue
                for path in home.glob(f"*{_UNFINISHED}"):
                    with contextlib.suppress(OSError):
                        if path.stat().st_mtime < before:
                            path.unlink()


def _delete(folder: Path) -> None:
    """A home, or what is left of one; with a warning if it is not allowed."""
    try:
        _remove(folder)
    except OSError as error:
        warnings.warn(
            f"cache of units {folder}: it may hold events of before an erasure, and could not be "
            f"deleted ({error.strerror or error}). Delete it, or give whoever opens the cache the "
            f"right to.",
            RuntimeWarning,
            stacklevel=5,
        )


def clear_cache(folder: str | os.PathLike[str]) -> None:
    """Delete all units in a folder, of whatever snapshot. Loaders that use it go on without it.

    Raises:
        StorageError: something there cannot be deleted.
    """
    root = Path(folder).absolute()
    try:
        for _ in range(_MOST_CLEARINGS):
            found = [*_homes(root), *root.glob(f"*{_GONE}")]
            if not found:
                return
            for home in found:
                _remove(home)
    except OSError as error:
        raise StorageError(str(folder), "clearing the cache of units", error) from error
    raise StorageError(
        str(folder), "clearing the cache of units", OSError("others open it over and over")
    )


def _remove(home: Path) -> None:
    """Delete a home, in one step for everybody else, or what is left of one.

    Raises:
        OSError: it is still there, with or without its name.
    """
    gone = home
    if home.suffix == _HOME:
        gone = home.with_name(f"{uuid.uuid4().hex}{_GONE}")
        try:
            home.rename(gone)
        except FileNotFoundError:
            return  # somebody else was faster
    for tries_left in reversed(range(_TRIES)):
        # It fails if somebody else deletes it too, or a file comes that was opened before it went.
        try:
            shutil.rmtree(gone)
        except OSError:
            if gone.exists() and not tries_left:
                raise
        if not gone.exists():
            return


def _homes(root: Path) -> list[Path]:
    """The folders that caches made here; none where there is no folder."""
    try:
        return [path for path in root.iterdir() if path.name.endswith(_HOME) and path.is_dir()]
    except FileNotFoundError:
        return []


def _facts_of(home: Path) -> dict[str, Any] | None:
    """What the units of a home were read from; None if that is not said, or not by a cache."""
    try:
        found = json.loads((home / _FACTS).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("vlm_units") != 1:
        return None
    erased = found.get("erased")
    if not isinstance(erased, dict) or not all(isinstance(n, int) for n in erased.values()):
        return None
    return found


def _entries(root: Path) -> Iterator[Entry]:
    for home in _homes(root):
        with contextlib.suppress(FileNotFoundError), os.scandir(home) as found:
            for file in found:
                if file.name.endswith(_SUFFIX):
                    with contextlib.suppress(FileNotFoundError):
                        stat = file.stat()
                        yield Entry(stat.st_mtime, file.path, stat.st_size)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
