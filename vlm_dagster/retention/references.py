"""What a table is held by: from named pins and referrers to versions, each with its reason.

A pointer dataset holds, of a history, what its sealed windows pin: at its newest version, and at every
version that something holds in turn. A checkpoint holds what its manifest pins.

A referrer that cannot be opened is not guessed about. A checkpoint holds what it was entered with; a
pointer dataset may pin anything, so it holds everything until it is found again or forgotten.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vlm_dagster.errors import VlmError
from vlm_dagster.retention.pins import read_pins
from vlm_dagster.retention.referrers import Referrer, matches, read_referrers
from vlm_dagster.sealed.sweep import DEFAULT_GRACE_S
from vlm_dagster.storage import open_storage

if TYPE_CHECKING:
    from vlm_dagster.history import SnapshotRef
    from vlm_dagster.pointers import PointerDataset, PointerRef
    from vlm_dagster.sealed.owner import WindowedTable

__all__ = ["CHECKPOINT", "Hold", "References", "Vanished", "find_references"]

# As `training/checkpoint.py` names it.
CHECKPOINT = "checkpoint.json"


@dataclass(frozen=True)
class Hold:
    """Something that a version is kept for.

    Attributes:
        version: that it names.
        holder: the name of a pin, or the address of a referrer.
        what: in few words what of the holder it is.
        pin: what it must be able to open again.
    """

    version: int
    kind: Literal["pin", "pointers", "checkpoint"]
    holder: str
    what: str
    pin: SnapshotRef | PointerRef

    def __str__(self) -> str:
        kind = {"pin": "pin", "pointers": "pointer dataset", "checkpoint": "checkpoint"}[self.kind]
        return f"{kind} {self.holder}{f' ({self.what})' if self.what else ''}"


@dataclass(frozen=True)
class Vanished:
    """A referrer that cannot be opened.

    Attributes:
        problem: why not.
        holds_all: whether nothing is known of what it pins, so that nothing can be let go.
    """

    referrer: Referrer
    problem: str
    holds_all: bool


@dataclass(frozen=True)
class References:
    """All that refers to a table.

    Attributes:
        forgotten: those of the vanished that need not be waited for any more.
    """

    holds: tuple[Hold, ...]
    vanished: tuple[Vanished, ...]
    forgotten: tuple[Vanished, ...]

    @property
    def holds_all(self) -> bool:
        """Whether some referrer that cannot be opened may refer to anything."""
        return any(one.holds_all for one in self.vanished)


def find_references(owner: WindowedTable, forget: Sequence[str] = ()) -> References:
    """What refers to a table now.

    Args:
        forget: addresses of referrers (`*` stands for anything) that hold nothing any more if they
            cannot be opened.

    Raises:
        TableError: a pin or an entry is damaged.
    """
    table = owner.sealed_table
    holds = [
        Hold(pin.version, "pin", pin.name, pin.reason, _ref(owner, pin.ref))
        for pin in read_pins(table)
    ]
    vanished: list[Vanished] = []
    referrers = read_referrers(table)
    found: dict[str, Sequence[Hold] | Vanished] = {}
    for referrer in referrers:
        found[referrer.path] = (
            _of_pointers(owner, referrer)
            if referrer.kind == "pointers"
            else _of_checkpoint(owner, referrer)
        )
    # A dataset that was moved is the same wherever it is found.
    there = {
        one.table_id
        for one in referrers
        if one.kind == "pointers" and not isinstance(found[one.path], Vanished)
    }
    for referrer in referrers:
        outcome = found[referrer.path]
        if not isinstance(outcome, Vanished):
            holds += outcome
        elif referrer.table_id not in there:
            vanished.append(outcome)
            if not matches(referrer, forget):
                holds += _recorded(owner, referrer)
    forgotten = tuple(one for one in vanished if matches(one.referrer, forget))
    return References(
        holds=tuple(dict.fromkeys(holds)),
        vanished=tuple(one for one in vanished if one not in forgotten),
        forgotten=forgotten,
    )


def _of_pointers(owner: WindowedTable, referrer: Referrer) -> list[Hold] | Vanished:
    from vlm_dagster.pointers import PointerDataset

    try:
        dataset = PointerDataset.open(
            referrer.uri, storage_options=owner.sealed_table.storage_options
        )
        if dataset.table_id != referrer.table_id:
            problem = f"another table lies there now (its id is {dataset.table_id})"
            return Vanished(referrer, problem, True)
        return list(_pins_of_dataset(owner, dataset))
    except VlmError as error:
        return Vanished(referrer, str(error), True)


def _pins_of_dataset(owner: WindowedTable, dataset: PointerDataset) -> Iterator[Hold]:
    from vlm_dagster.pointers.snapshot import pins_of_window

    newest = dataset.state()
    held = {hold.version for hold in find_references(dataset).holds}
    versions = [newest.version, *(v for v in sorted(held) if v not in newest.retired)]
    counts: Counter[SnapshotRef] = Counter()
    seen: set[tuple[str, int]] = set()
    for version in versions:
        for sealed in dataset.state(version).sealed.values():
            if (sealed.window.segment, sealed.revision) not in seen:
                seen.add((sealed.window.segment, sealed.revision))
                counts.update(pins_of_window(sealed).values())
    for pin, num in counts.items():
        if pin.table_id == owner.table_id:
            what = f"{num:,} window{'s' if num > 1 else ''}"
            yield Hold(pin.version, "pointers", dataset.uri, what, pin)


def _of_checkpoint(owner: WindowedTable, referrer: Referrer) -> list[Hold] | Vanished:
    options = owner.sealed_table.storage_options if "://" in referrer.uri else None
    holds: list[Hold] = []
    written_s: float | None = None
    try:
        storage = open_storage(referrer.uri, options)
        for info in storage.list():
            folder, _, name = info.path.rpartition("/")
            if name == CHECKPOINT and not (folder and referrer.pins):
                pins = json.loads(storage.read_bytes(info.path))["pins"]
                uri = f"{referrer.uri}/{folder}" if folder else referrer.uri
                holds += _pins_of_checkpoint(owner, uri, pins)
                written_s = max(info.modified_s, written_s or 0.0)
    except (VlmError, OSError, ValueError, KeyError, TypeError) as error:
        return Vanished(referrer, f"it cannot be read ({error})", not referrer.pins)
    if written_s is None:
        problem = f"there is no {CHECKPOINT} there: it was moved or deleted, or never finished"
        return Vanished(referrer, problem, not referrer.pins)
    # Entered after the checkpoint there was written, or about then: by a run that is still to replace it.
    if referrer.registered_s > written_s - DEFAULT_GRACE_S:
        holds += _recorded(owner, referrer)
    return holds


def _recorded(owner: WindowedTable, referrer: Referrer) -> list[Hold]:
    return list(_pins_of_checkpoint(owner, referrer.uri, referrer.pins))


def _pins_of_checkpoint(owner: WindowedTable, uri: str, pins: Mapping[str, Any]) -> Iterator[Hold]:
    from vlm_dagster.pointers import PointerRef

    for role, value in pins.items():
        if value:
            ref = PointerRef.from_json(value)
            named: list[SnapshotRef | PointerRef] = [ref, *ref.pins]
            for pin in named:
                if pin.table_id == owner.table_id:
                    yield Hold(pin.version, "checkpoint", uri, role, pin)


def _ref(owner: WindowedTable, value: Mapping[str, Any]) -> SnapshotRef | PointerRef:
    from vlm_dagster.history import SnapshotRef
    from vlm_dagster.pointers import PointerRef

    if owner.sealed_table.spec.kind == "history":
        return SnapshotRef.from_json(value)
    return PointerRef.from_json(value)
