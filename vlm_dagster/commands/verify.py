"""`vlm-dagster verify`: is everything behind a table or a checkpoint still what was sealed?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vlm_dagster.commands.opening import CheckpointFolder, Opened
from vlm_dagster.errors import VlmError
from vlm_dagster.history import HistoryStore, Snapshot, SnapshotRef
from vlm_dagster.pointers import PointerDataset, PointerRef, PointerSnapshot
from vlm_dagster.sealed import VerifyReport
from vlm_dagster.sealed.writer import sha256_of

__all__ = ["Verified", "verify_all"]

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Verified:
    """Reports on each table looked at, and every problem found."""

    reports: tuple[VerifyReport, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def verify_all(
    opened: Opened,
    *,
    version: int | None = None,
    deep: bool = False,
    storage_options: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Verified:
    """Verify a table, or a checkpoint with all that it pins.

    Args:
        deep: decode every row and recompute the digests, not only check the bytes.
        progress: called with the bytes checked, as they are.
    """
    reports: list[VerifyReport] = []
    problems: list[str] = []
    targets: list[Snapshot | PointerSnapshot] = []
    if isinstance(opened, HistoryStore):
        targets.append(opened.snapshot(version))
    elif isinstance(opened, PointerDataset):
        targets.append(opened.snapshot(version=version))
    else:
        problems += _check_weights(opened)
        for ref in _pinned(opened):
            try:
                targets.append(ref.open(storage_options))
            except VlmError as error:
                problems.append(str(error))
    seen: dict[str, set[str]] = {}
    for target in targets:
        files = set(target.files()["path"].to_pylist())
        if isinstance(target, Snapshot) and files <= seen.setdefault(target.uri, set()):
            continue  # an older pin without files of its own
        seen.setdefault(target.uri, set()).update(files)
        report = target.verify(deep=deep, progress=progress)
        reports.append(report)
        problems += report.problems
    return Verified(tuple(reports), tuple(dict.fromkeys(problems)))


def _check_weights(opened: CheckpointFolder) -> list[str]:
    manifest = opened.manifest
    path = Path(opened.path, manifest.weights_file)
    if not path.exists():
        return [f"{path}: the weights are missing. Restore them from a copy, or train again."]
    found = sha256_of(path)
    if found != manifest.weights_digest:
        return [
            f"{path}: the weights hash to {found}, but the checkpoint names "
            f"{manifest.weights_digest}. Restore them from a copy, or train again."
        ]
    return []


def _pinned(opened: CheckpointFolder) -> list[PointerRef | SnapshotRef]:
    """Every pointer window that the checkpoint pins, and every history pin, newest first: unless
    it was compacted between them, the newest has all files of the older ones."""
    pointers = [PointerRef.from_json(pin) for pin in opened.manifest.pins.values() if pin]
    histories = {pin for ref in pointers for pin in ref.pins}
    return [*pointers, *sorted(histories, key=lambda pin: (pin.uri, -pin.version))]
