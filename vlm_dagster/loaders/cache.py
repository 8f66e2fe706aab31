"""Decoded units kept in a local folder: a second epoch over the same snapshot decodes nothing.

The name of a unit's file is a digest of all that decides what is in it, so what is found is what would
have been read: snapshots never change. Any number of processes may share a folder (cache_folder.py).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import shutil
import threading
import time
import warnings
from pathlib import Path

import pyarrow as pa

from vlm_dagster.errors import SchemaError, StorageError
from vlm_dagster.history import ArenaBuffers
from vlm_dagster.loaders.cache_facts import CacheFacts
from vlm_dagster.loaders.cache_file import HEADER_BYTES, DamagedError, read_unit, write_unit
from vlm_dagster.loaders.cache_folder import CacheFolder, clear_cache
from vlm_dagster.loaders.materialize import UnitData
from vlm_dagster.loaders.packing import PackedUnit
from vlm_dagster.loaders.plan import Unit
from vlm_dagster.loaders.sources import UnitSource

__all__ = ["CachedSource", "clear_cache"]

_LOG = logging.getLogger("vlm_dagster.loader")

# What was written since the folder was last looked through, as a share of what it may hold: by so
# much, times the processes that write, it may be larger for a while.
_LOOK_AGAIN = 16
# And so much is made free at once.
_SPARE = 16
# Of the disk, left to others: so much, or of a small one such a share.
_FREE_BYTES = 1 << 30
_FREE_SHARE = 20
# Failures of the moment, which say nothing of the folder: the unit is not kept, that is all.
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN)
# A full folder with nothing to evict is left alone for so long.
_FULL_S = 60.0
# File systems stamp files by a clock that is a little behind.
_CLOCK_S = 1.0


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
        folder: made if there is none; what is put there is readable by its owner only.
        facts: of what `source` reads.
        max_bytes: of all units in the folder together. Whatever it says, a gigabyte of the disk stays
            free, or a twentieth of one smaller than 20 GiB.
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
            source.close()
            raise SchemaError(f"cache_bytes={max_bytes!r}", "Use a number of bytes of 0 or more.")
        self._source = source
        self._facts = facts
        self._max_bytes = max_bytes
        self._buffers = buffers or ArenaBuffers()
        self._lock = threading.Lock()
        self._opened_s = time.time() - _CLOCK_S
        self._full_until_s = 0.0
        self._told_of_disk = False
        self.num_hits = 0
        self.num_misses = 0
        self.num_damaged = 0
        self.num_written = 0
        try:
            self._folder = CacheFolder(folder, facts)
            self._make_room(0, math.inf)
        except BaseException as error:
            source.close()
            if not isinstance(error, OSError):
                raise
            raise StorageError(
                str(folder), "opening the cache of units", error, writing=False
            ) from error
        self._writes = not self._folder.is_outdated
        if not self._writes:
            _LOG.info(
                "cache of units %s knows of an erasure that what is read here is from before: "
                "nothing is put there",
                self._folder.root,
            )

    def read(self, unit: Unit, user_ids: pa.Array, *, verify: bool) -> UnitData:
        """As `UnitSource.read`. What was put here unverified is read again when it has to be
        verified."""
        key = self._facts.key_of(unit, user_ids, verify=verify)
        path = self._folder.path_of(key)
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
        if not self._fits(HEADER_BYTES + packed.num_bytes):
            return
        unfinished = self._folder.unfinished()
        try:
            before = path.stat().st_size if path.exists() else 0
            num_bytes = write_unit(unfinished, key, packed, self._buffers, verified=verified)
            unfinished.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            if error.errno not in _PASSING:
                self._stop_writing(error)
            return
        with self._lock:
            self._num_bytes += num_bytes - before
            self.num_written += 1

    def _stop_writing(self, error: OSError) -> None:
        with self._lock:
            warned, self._writes = not self._writes, False
        if warned:
            return
        if self._folder.is_gone:
            # Somebody wants none of these units to be kept: an erasure, or `clear_cache`.
            _LOG.info(
                "cache of units %s was cleared: this loader goes on without", self._folder.root
            )
        else:
            warnings.warn(
                f"cache of units {self._folder.root}: nothing more is put there, because writing failed "
                f"({error.strerror or error}). Loading goes on without. Free space or repair access, "
                f"then make a new loader.",
                RuntimeWarning,
                stacklevel=4,
            )

    # -- how much there is ----------------------------------------------------------------------

    def _fits(self, num_bytes: int) -> bool:
        """Whether there is room for so many bytes more, after making some."""
        if num_bytes > self._max_bytes:
            return False
        with self._lock:
            if num_bytes > self._room_on_disk():
                return False
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

    def _room_on_disk(self) -> int:
        """What a unit may take of it, so that something is left to others."""
        try:
            disk = shutil.disk_usage(self._folder.root)
        except OSError:  # the folder is gone: writing says so
            return self._max_bytes
        room = disk.free - min(_FREE_BYTES, disk.total // _FREE_SHARE)
        if room <= 0 and not self._told_of_disk:
            self._told_of_disk = True
            _LOG.warning(
                "cache of units %s: the disk is nearly full, nothing more is put there until there is "
                "room",
                self._folder.root,
            )
        return room

    def _make_room(self, num_bytes: int, used_before_s: float) -> None:
        """Look through the folder, and evict the longest unused of what was last used before."""
        entries = self._folder.entries()
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
