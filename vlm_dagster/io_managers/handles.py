"""What assets and IO managers hand to each other. Handles, never tables.

Downstream, an input is a `SnapshotRef` (a history at one version), a `PointerRef` (windows of a
pointer dataset at one version) or a `CheckpointRef`: frozen, picklable values that say exactly which
bytes are meant and hold no credentials. Towards the IO manager goes a `Sealing`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlm_dagster.errors import SchemaError
from vlm_dagster.sealed import Sealed, SealedWindow, StagedWindow

__all__ = ["CheckpointRef", "Sealing", "keep_sealed"]


@dataclass
class Sealing:
    """Staged windows on their way to an IO manager, which commits them.

    Attributes:
        staged: the windows, oldest first.
        sealed: what became of each, in the same order; filled when they are committed, in the same
            process. That is how an asset over many partitions learns each one's version.
        watermark_us: the table's watermark after the last of them, UTC microseconds.
    """

    staged: tuple[StagedWindow, ...]
    sealed: list[Sealed] = field(default_factory=list)
    watermark_us: int | None = None

    @classmethod
    def of(cls, value: object) -> Sealing:
        """A `Sealing`, a `StagedWindow`, or an iterable of these, as a `Sealing`."""
        if isinstance(value, Sealing):
            return value
        if isinstance(value, StagedWindow):
            return cls((value,))
        windows = tuple(value) if isinstance(value, Iterable) else ()
        if not windows or not all(isinstance(window, StagedWindow) for window in windows):
            raise SchemaError(
                f"this IO manager got a {type(value).__name__}, not staged windows",
                "Return what HistoryStore.stage or PointerDataset.stage gave, or a list of these, "
                "e.g. dg.MaterializeResult(value=store.stage(key, events)).",
            )
        return cls(tuple(sorted(windows, key=lambda staged: staged.window)))


def keep_sealed(uri: str, table_id: str, found: SealedWindow) -> StagedWindow:
    """A sealed window as if it had been staged again with the same content."""
    return StagedWindow(
        uri=uri,
        table_id=table_id,
        window=found.window,
        digest=found.digest,
        num_rows=found.num_rows,
        num_users=int(found.facts.get("num_users", 0)),
        num_duplicates=int(found.facts.get("num_duplicates", 0)),
        files=(),
        facts=found.facts,
        already_sealed=True,
    )


@dataclass(frozen=True)
class CheckpointRef:
    """A pin: names a checkpoint so that what is loaded later is that very one.

    Attributes:
        folder: where it lies.
        digest: of its manifest: weights, vocabulary, configuration, metrics and pins.
        weights_digest: SHA-256 of the weights file; equal for equal runs.
    """

    folder: str
    digest: str
    weights_digest: str

    def to_json(self) -> dict[str, str]:
        return {
            "folder": self.folder,
            "digest": self.digest,
            "weights_digest": self.weights_digest,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CheckpointRef:
        return cls(value["folder"], value["digest"], value["weights_digest"])
