"""Decoded units kept in a local folder: a second epoch over the same snapshot decodes nothing.

    FOLDER/DATA/facts.json      which tables and columns the units below were read from
    FOLDER/DATA/UNIT.unit       a unit
    FOLDER/DATA/*.tmp           one that is being written

Both names are digests of all that decides what is in a unit, so what is found is what would have been
read: snapshots never change. Any number of processes may share a folder.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from vlm_dagster.errors import SchemaError, StorageError
from vlm_dagster.history import ArenaBuffers
from vlm_dagster.loaders.cache_facts import CacheFacts
from vlm_dagster.loaders.cache_file import DamagedError, read_unit, write_unit
from vlm_dagster.loaders.materialize import UnitData
from vlm_dagster.loaders.packing import PackedUnit
from vlm_dagster.loaders.plan import Unit
from vlm_dagster.loaders.sources import UnitSource

__all__ = ["CachedSource", "clear_cache"]

_FACTS = "facts.json"
_SUFFIX = ".unit"
_UNFINISHED = ".tmp"
# Writing a unit takes milliseconds: whoever began so long ago was killed.
_UNFINISHED_S = 900.0
# What was written since the folder was last looked through, as a share of what it may hold: by so
# much, times the processes that write, it may be larger for a while.
_LOOK_AGAIN = 16
# And so much is made free at once.
_SPARE = 16
# A full folder with nothing to evict is left alone for so long.
_FULL_S = 60.0
# File systems stamp files by a clock that is a little behind.
_CLOCK_S = 1.0


class _Entry(NamedTuple):
    """A unit's file, in order of its last use."""

    used_s: float
    path: str
    num_bytes: int


class CachedSource:
    """Gives units from a folder, and puts those there that it has to read from another source.

    Nothing in the folder is trusted: a file that is cut short or altered is read anew. If the
    folder cannot be written any more, a full disk say, one warning says so and the epoch goes on.

    What has not been used for longest goes first, but nothing that anybody has used since this source
    was opened: of an epoch larger than the cache, every unit would else be evicted, by this
    rank or another, just before it is asked for again. So of such an epoch a part is kept, and the
    rest is read.

    **Erased users.** The folder holds copies of events. Opening it for a snapshot that knows of an
    erasure deletes all units of earlier states of its tables, whoever wrote them, and whatever
    snapshot they were of; a loader that was using them stops writing. Until somebody opens the folder,
    `clear_cache` is the way to delete them.

    Args:
        source: what reads units that are not here; closed with this one.
        folder: made if there is none, then readable by its owner only.
        facts: of what `source` reads.
        max_bytes: of all units in the folder together.
        buffers: memory to read into; its own if None.

    Attributes:
        num_hits, num_misses: units that came from the folder, or not.
        num_damaged: files that were not what was written there.
        num_written: units that were put there.

    Raises:
        SchemaError: `max_bytes` is no number of bytes.
        StorageError: the folder cannot be made or listed.
    """

    def __init__(
        self,
        source: UnitSource,
        folder: str | os.PathLike[str],
        facts: CacheFacts,
        *,
        max_bytes: int,
        buffers: ArenaBuffers | None = None,
    ) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
            raise SchemaError(f"cache_bytes={max_bytes!r}", "Use a number of bytes of 0 or more.")
        self._source = source
        self._root = Path(folder)
        self._facts = facts
        self._home = self._root / facts.digest
        self._max_bytes = max_bytes
        self._buffers = buffers or ArenaBuffers()
        self._lock = threading.Lock()
        self._opened_s = time.time() - _CLOCK_S
        self._full_until_s = 0.0
        self._writes = True
        self._made_home = False
        self.num_hits = 0
        self.num_misses = 0
        self.num_damaged = 0
        self.num_written = 0
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            _sweep(self._root, facts)
            self._make_room(0, math.inf)
        except OSError as error:
            raise StorageError(
                str(self._root), "opening the cache of units", error, writing=False
            ) from error

    def read(self, unit: Unit, user_ids: pa.Array, *, verify: bool) -> UnitData:
        """As `UnitSource.read`. What was put here unverified is read again when it has to be
        verified."""
        key = self._facts.key_of(unit, user_ids, verify=verify)
        path = self._home / f"{key.hex()}{_SUFFIX}"
        found = self._found(path, key, verify=verify)
        with self._lock:
            self.num_hits += found is not None
            self.num_misses += found is None
        if found is not None:
            return found
        read = self._source.read(unit, user_ids, verify=verify)
        if self._writes and read.bad is None:
            self._keep(path, key, read, verified=verify)
        return read

    @property
    def bytes_read(self) -> int | None:
        """As `UnitSource.bytes_read`: of the tables, not of the folder."""
        return self._source.bytes_read

    def close(self) -> None:
        """Close the source behind; the folder stays."""
        self._source.close()

    # -- what is there --------------------------------------------------------------------------

    def _found(self, path: Path, key: bytes, *, verify: bool) -> UnitData | None:
        try:
            found, verified = read_unit(path, key, self._buffers)
        except OSError:  # there is none, or it cannot be read now
            return None
        except DamagedError:
            with self._lock:
                self.num_damaged += 1
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        if verify and not verified:
            return None
        with contextlib.suppress(OSError):  # evicted meanwhile: what was read is whole
            os.utime(path)
        return found

    def _keep(self, path: Path, key: bytes, unit: UnitData, *, verified: bool) -> None:
        packed = PackedUnit(unit)
        if not self._fits(packed.num_bytes):
            return
        unfinished = path.with_name(f"{uuid.uuid4().hex}{_UNFINISHED}")
        try:
            self._make_home()
            num_bytes = write_unit(unfinished, key, packed, self._buffers, verified=verified)
            unfinished.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            self._stop_writing(error)
            return
        with self._lock:
            self._num_bytes += num_bytes
            self.num_written += 1

    def _make_home(self) -> None:
        """Once: if it is gone later, then somebody wants none of these units to be kept."""
        with self._lock:
            made, self._made_home = self._made_home, True
        if made:
            return
        self._home.mkdir(exist_ok=True)
        unfinished = self._home / f"{uuid.uuid4().hex}{_UNFINISHED}"
        unfinished.write_text(json.dumps(self._facts.to_json(), indent=1))
        unfinished.replace(self._home / _FACTS)

    def _stop_writing(self, error: OSError) -> None:
        with self._lock:
            warned, self._writes = not self._writes, False
        if not warned:
            warnings.warn(
                f"cache of units {self._root}: nothing more is put there, because writing failed "
                f"({error.strerror or error}). Loading goes on without. Free space or repair access, "
                f"then make a new loader.",
                RuntimeWarning,
                stacklevel=4,
            )

    # -- how much there is ----------------------------------------------------------------------

    def _fits(self, num_bytes: int) -> bool:
        """Whether there is room for so many bytes more, after making some."""
        with self._lock:
            if self._num_bytes + num_bytes <= min(self._max_bytes, self._look_again):
                return True
            if time.monotonic() < self._full_until_s:
                return False
            try:
                self._make_room(num_bytes, self._opened_s)
            except OSError:
                return False
            fits = self._num_bytes + num_bytes <= self._max_bytes
            if not fits:
                self._full_until_s = time.monotonic() + _FULL_S
            return fits

    def _make_room(self, num_bytes: int, used_before_s: float) -> None:
        """Look through the folder, and evict the longest unused of what was last used before."""
        entries = sorted(_entries(self._root))
        total = sum(entry.num_bytes for entry in entries)
        if total + num_bytes > self._max_bytes:
            goal = self._max_bytes - num_bytes - self._max_bytes // _SPARE
            for entry in entries:
                if total <= goal or entry.used_s >= used_before_s:
                    break
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)
                    total -= entry.num_bytes
        self._num_bytes = total
        self._look_again = total + self._max_bytes // _LOOK_AGAIN


def clear_cache(folder: str | os.PathLike[str]) -> None:
    """Delete all units in a folder, of whatever snapshot. Loaders that use it read anew.

    Raises:
        StorageError: something there cannot be deleted.
    """
    try:
        for home in _homes(Path(folder)):
            shutil.rmtree(home)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(str(folder), "clearing the cache of units", error) from error


def _homes(root: Path) -> list[Path]:
    """The folders that caches made here."""
    return [path for path in root.iterdir() if len(path.name) == 32 and path.is_dir()]


def _entries(root: Path) -> Iterator[_Entry]:
    for home in _homes(root):
        with contextlib.suppress(FileNotFoundError), os.scandir(home) as found:
            for file in found:
                if file.name.endswith(_SUFFIX):
                    with contextlib.suppress(FileNotFoundError):
                        stat = file.stat()
                        yield _Entry(stat.st_mtime, file.path, stat.st_size)


def _sweep(root: Path, facts: CacheFacts) -> None:
    """Delete what killed writers left, and what knows less of erasures than `facts`."""
    before = time.time() - _UNFINISHED_S
    for home in _homes(root):
        with contextlib.suppress(FileNotFoundError):
            try:
                known = json.loads((home / _FACTS).read_text())
            except FileNotFoundError:
                known = {}  # killed before it wrote them; units come later
            except ValueError:
                known = None
            if known is None or facts.outdates(known):
                shutil.rmtree(home, ignore_errors=True)
                continue
            for path in home.glob(f"*{_UNFINISHED}"):
                if path.stat().st_mtime < before:
                    path.unlink(missing_ok=True)
