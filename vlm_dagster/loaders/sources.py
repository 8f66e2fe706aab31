"""Where units come from: a seam, and the source that reads them right here.

DirectSource    reads and decodes in the calling thread
CachedSource    keeps decoded units in a local folder (cache.py)
ProcessSource   has them read by other processes (processes.py)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import pyarrow as pa

from vlm_dagster.history import ArenaBuffers, Snapshot, SnapshotRef
from vlm_dagster.loaders.materialize import UnitData, materialize
from vlm_dagster.loaders.plan import Unit
from vlm_dagster.pointers import PointerRef, PointerSnapshot
from vlm_dagster.schema import Projection

__all__ = ["DirectSource", "ReadSpec", "UnitSource"]


class UnitSource(Protocol):
    """Gives units, to any number of threads at a time."""

    def read(self, unit: Unit, user_ids: pa.Array, *, verify: bool) -> UnitData:
        """A unit, read and decoded. Sequences that are not what their pointers were made for are marked
        (`UnitData.kept`).

        Its memory may be used again once nothing refers to its arrays any more.

        Args:
            user_ids: [U] the unit's users, sorted.
            verify: prove every sequence by its pointer's checksum, unless that was done before and
                what was proved is kept.

        Raises:
            PinError, CorruptFileError, StorageError: what is pinned cannot be read.
        """
        ...

    @property
    def bytes_read(self) -> int | None:
        """Of files, as stored, footers aside, since the source was made; None if unknown."""
        ...

    def close(self) -> None:
        """Let go of all that the source holds, promptly, whatever is being read. Units that were
        handed out stay whole; closing twice is fine."""
        ...


class DirectSource:
    """Reads units in the calling thread.

    Args:
        histories: one snapshot a group, in which all of the pointers hold.
        projections: what to read of each group.
        columns: of the examples.
        whole: leave out examples that could not be verified, whether they are or not.
        buffers: memory to read into, over and over; its own if None.
    """

    def __init__(
        self,
        pointers: PointerSnapshot,
        histories: Mapping[str, Snapshot],
        projections: Mapping[str, Projection],
        columns: Sequence[str],
        buffers: ArenaBuffers | None = None,
        *,
        whole: bool | None = None,
    ) -> None:
        self._pointers = pointers
        self._histories = dict(histories)
        self._projections = dict(projections)
        self._columns = tuple(columns)
        self._whole = whole
        self._buffers = buffers or ArenaBuffers()
        self._stats = [pointers.stats, *(found.stats for found in histories.values())]
        for stats in self._stats:
            stats.counts_bytes = True
        self._bytes_before = sum(stats.data_bytes for stats in self._stats)

    def read(self, unit: Unit, user_ids: pa.Array, *, verify: bool) -> UnitData:
        """As `UnitSource.read`."""
        pointers = self._pointers if unit.window is None else self._pointers.only(unit.window)
        return materialize(
            pointers,
            self._histories,
            self._projections,
            unit.bucket,
            user_ids,
            columns=self._columns,
            verify=verify,
            whole=self._whole,
            buffers=self._buffers,
        )

    @property
    def bytes_read(self) -> int:
        """As `UnitSource.bytes_read`; of the tables, so what others read from them counts too."""
        return sum(stats.data_bytes for stats in self._stats) - self._bytes_before

    def close(self) -> None:
        """Nothing is held but memory, which goes with the source."""


@dataclass(frozen=True)
class ReadSpec:
    """All that reading units takes, as a value: pickled, it can be opened in any process.

    Attributes:
        pointers: the pinned examples.
        histories: the pinned snapshot of each group, where it lies now.
        projections: what to read of each group.
        columns: of the examples.
        whole: see `DirectSource`.
        storage_options: as deltalake takes them. Never shown, but pickled: a spec holds credentials.
    """

    pointers: PointerRef
    histories: Mapping[str, SnapshotRef]
    projections: Mapping[str, Projection]
    columns: tuple[str, ...]
    whole: bool | None = None
    storage_options: Mapping[str, str] | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        pointers: PointerSnapshot,
        histories: Mapping[str, Snapshot],
        projections: Mapping[str, Projection],
        columns: Sequence[str],
        storage_options: Mapping[str, str] | None = None,
        *,
        whole: bool | None = None,
    ) -> ReadSpec:
        """The spec of what is open here. A pin of a table that was moved names its old place, so the
        snapshot's own comes in its stead."""
        pins = {g: replace(found.ref(), uri=found.uri) for g, found in histories.items()}
        return cls(
            pointers.ref(),
            pins,
            dict(projections),
            tuple(columns),
            whole,
            dict(storage_options) if storage_options else None,
        )

    def open(self, buffers: ArenaBuffers | None = None) -> DirectSource:
        """Open what is pinned.

        Raises:
            TableError, PinError: it is gone or has changed.
        """
        return DirectSource(
            self.pointers.open(self.storage_options),
            {group: pin.open(self.storage_options) for group, pin in self.histories.items()},
            self.projections,
            self.columns,
            buffers,
            whole=self.whole,
        )
