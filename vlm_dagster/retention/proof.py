"""Does a version hold what a pin names? By digests alone: no row is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlm_dagster.sealed.log import SealedWindow, TableState

if TYPE_CHECKING:
    from vlm_dagster.history import SnapshotRef
    from vlm_dagster.pointers import PointerRef

__all__ = ["dropped_since", "holds_content", "holds_rows"]


def holds_content(state: TableState, pin: SnapshotRef | PointerRef) -> bool:
    """Whether the windows that a pin names were sealed, at a version, with the content it names."""
    from vlm_dagster.history.snapshot import prefix_digest

    windows = _windows(state, pin)
    return windows is not None and prefix_digest(windows) == pin.digest


def holds_rows(state: TableState, pin: SnapshotRef | PointerRef, pinned: TableState) -> bool:
    """Whether, moreover, every row that the pinned version has of them is still there."""
    if not holds_content(state, pin):
        return False
    if state.gone.edition == pinned.gone.edition:
        return True
    windows = _windows(pinned, pin) or []
    indices = [sealed.window.index for sealed in windows]
    return all(state.left(index) == pinned.left(index) for index in indices)


def dropped_since(state: TableState, pin: SnapshotRef | PointerRef, pinned: TableState) -> bool:
    """Whether rows of the windows that a pin names, which the pinned version has, were dropped by age
    by a later version."""
    drops = [one.through for one in state.gone.removals if one.kind == "drop"]
    last = max((state.grid.parse(key).index for key in drops), default=-1)
    indices = (sealed.window.index for sealed in _windows(pinned, pin) or [])
    return any(
        pinned.left(index).num_rows > state.left(index).num_rows
        for index in indices
        if index <= last
    )


def _windows(state: TableState, pin: SnapshotRef | PointerRef) -> list[SealedWindow] | None:
    from vlm_dagster.pointers import PointerRef

    if isinstance(pin, PointerRef):
        indices = [state.grid.parse(key).index for key in pin.windows]
        if not all(index in state.sealed for index in indices):
            return None
        return [state.sealed[index] for index in sorted(indices)]
    if pin.watermark_us is None:
        return []
    return [sealed for sealed in state.covered if sealed.window.end_us <= pin.watermark_us]
