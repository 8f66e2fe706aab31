"""Some windows of a pointer dataset at one version: what a pin names, and what an epoch goes over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vlm_dagster.errors import WindowError
from vlm_dagster.history.arena import BucketIndex
from vlm_dagster.history.snapshot import SnapshotRef, prefix_digest
from vlm_dagster.pointers.spec import PointerSpec
from vlm_dagster.sealed import SealedTable, SealedWindow, TableState, VerifyReport
from vlm_dagster.sealed.gone import Removal
from vlm_dagster.sealed.stats import ReadStats
from vlm_dagster.sealed.verify import verify
from vlm_dagster.storage import redact

__all__ = ["PointerRef", "PointerSnapshot", "pins_of_window"]


@dataclass(frozen=True)
class PointerRef:
    """A pin: names some windows of a pointer dataset at one version.

    Picklable and JSON-able; holds no credentials.

    Attributes:
        windows: their keys, oldest first.
        digest: `prefix_digest` of these windows.
        pins: the distinct history snapshots that these windows point into.
    """

    uri: str
    table_id: str
    version: int
    windows: tuple[str, ...]
    digest: str
    pins: tuple[SnapshotRef, ...]

    def open(
        self, storage_options: Mapping[str, str] | None = None, *, uri: str | None = None
    ) -> PointerSnapshot:
        """Open the pinned windows, refusing anything that is not them. Where the pinned version was
        retired, they are opened at the newest one that holds them.

        Raises:
            TableError: the dataset or the version is gone.
            PinError: what lies there is another dataset, or holds other content.
        """
        from vlm_dagster.pointers.dataset import PointerDataset

        dataset = PointerDataset.open(uri or self.uri, storage_options=storage_options)
        return dataset.pinned(self)

    def to_json(self) -> dict[str, Any]:
        return {
            "uri": redact(self.uri),
            "table_id": self.table_id,
            "version": self.version,
            "windows": list(self.windows),
            "digest": self.digest,
            "pins": [pin.to_json() for pin in self.pins],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PointerRef:
        return cls(
            uri=value["uri"],
            table_id=value["table_id"],
            version=value["version"],
            windows=tuple(value["windows"]),
            digest=value["digest"],
            pins=tuple(SnapshotRef.from_json(pin) for pin in value["pins"]),
        )


class PointerSnapshot:
    """Some windows of a pointer dataset at one version: what an epoch of training goes over."""

    def __init__(
        self, table: SealedTable, spec: PointerSpec, state: TableState, windows: list[SealedWindow]
    ) -> None:
        self._table = table
        self._state = state
        self.spec = spec
        self.version = state.version
        self.windows = windows
        self._segments = [sealed.window.segment for sealed in windows]

    @property
    def uri(self) -> str:
        return self._table.uri

    @property
    def stats(self) -> ReadStats:
        """What was read of the dataset through its handle, by this snapshot and others."""
        return self._table.stats

    @property
    def num_buckets(self) -> int:
        return self._table.spec.num_buckets

    @property
    def num_examples(self) -> int:
        return sum(self._state.left(sealed.window.index).num_rows for sealed in self.windows)

    @property
    def removals(self) -> tuple[Removal, ...]:
        """The record of what left the dataset, oldest first."""
        return self._state.gone.removals

    def num_gone(self, sealed: SealedWindow) -> int:
        """The examples of a window that have left since it was sealed."""
        return sealed.num_rows - self._state.left(sealed.window.index).num_rows

    @cached_property
    def digest(self) -> str:
        """One digest of all examples of these windows."""
        return prefix_digest(self.windows)

    def only(self, window: str) -> PointerSnapshot:
        """One of these windows by itself."""
        for sealed in self.windows:
            if sealed.window.key == window:
                return PointerSnapshot(self._table, self.spec, self._state, [sealed])
        raise WindowError(window, f"not among the windows of {self.uri} read here", "Name one.")

    def pins_of(self, window: str) -> dict[str, SnapshotRef]:
        """The history snapshots, by group, that one window points into."""
        return pins_of_window(self.only(window).windows[0])

    def pins(self) -> dict[str, tuple[SnapshotRef, ...]]:
        """The distinct history snapshots of each group, oldest version first."""
        found: dict[str, set[SnapshotRef]] = {group: set() for group in self.spec.groups}
        for sealed in self.windows:
            for group, pin in pins_of_window(sealed).items():
                found[group].add(pin)
        return {
            group: tuple(sorted(pins, key=lambda p: (p.version, p.uri)))
            for group, pins in found.items()
        }

    def ref(self) -> PointerRef:
        """The pin that names these windows."""
        return PointerRef(
            uri=self.uri,
            table_id=self._table.table_id,
            version=self.version,
            windows=tuple(sealed.window.key for sealed in self.windows),
            digest=self.digest,
            pins=tuple(pin for pins in self.pins().values() for pin in pins),
        )

    def files(self) -> pa.Table:
        """The files behind these windows: path, segment, bucket, num_rows, size_bytes."""
        files = self._table.files(self.version)
        return files.filter(pc.is_in(files["segment"], pa.array(self._segments, pa.string())))

    def users_of_bucket(self, bucket: int) -> pa.Array:
        """The users with an example in a bucket, sorted and distinct."""
        readers = self._table.readers(self.version, bucket, self._segments)
        found = [reader.users.user_ids for _, reader in readers]
        if not found:
            return pa.array([], self.spec.user_id)
        return pa.concat_arrays(found).unique().sort()

    def bucket_index(self, bucket: int, user_ids: pa.Array) -> BucketIndex:
        """Where the examples of these users (sorted, distinct, all of this bucket) lie; each
        user's examples stand in order of request time."""
        found = self._table.readers(self.version, bucket, self._segments)
        readers = [reader for _, reader in found]
        return BucketIndex(readers, user_ids, self.spec.schema)

    def to_table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All examples, window by window; sorted by (bucket, user, time) within each."""
        names = list(columns or self.spec.schema.names)
        schema = pa.schema([self.spec.schema.field(name) for name in names])
        tables = [
            reader.read_groups(names).cast(schema)
            for _, reader in self._table.all_readers(self.version, self._segments)
        ]
        return pa.concat_tables(tables) if tables else schema.empty_table()

    def verify(
        self, *, deep: bool = False, progress: Callable[[int], None] | None = None
    ) -> VerifyReport:
        """Check that the files are what was sealed; see `vlm_dagster.sealed.verify`."""
        keys = {sealed.window.key for sealed in self.windows}
        return verify(self._table, self.version, windows=keys, deep=deep, progress=progress)


def pins_of_window(sealed: SealedWindow) -> dict[str, SnapshotRef]:
    """The history snapshots, by group, that a sealed window points into."""
    return {group: SnapshotRef.from_json(pin) for group, pin in sealed.facts["pins"].items()}
