"""Garbage collection: keep what something refers to, retire the rest, then delete its files.

In this order, so that it may be killed anywhere: versions are retired by a transaction first, and from
then on a pin to one of them opens a later version; files go afterwards, and going on with that is all
that is left to do.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vlm_dagster.errors import CorruptFileError, SchemaError, StorageError, VlmError
from vlm_dagster.retention.pins import FOLDER as PINS
from vlm_dagster.retention.proof import holds_content, holds_rows
from vlm_dagster.retention.protection import missing_protection, restore_protection
from vlm_dagster.retention.purge import PurgeReport, collectable, purge
from vlm_dagster.retention.references import Hold, References, Vanished, find_references
from vlm_dagster.retention.referrers import FOLDER as REFERRERS
from vlm_dagster.retention.referrers import forget as forget_referrers
from vlm_dagster.sealed.lifetimes import FOREVER, Lifetimes
from vlm_dagster.sealed.log import TableState
from vlm_dagster.sealed.retired import Retired, retire
from vlm_dagster.sealed.sweep import DEFAULT_GRACE_S
from vlm_dagster.sealed.table import SealedTable
from vlm_dagster.sealed.verify import verify as verify_files
from vlm_dagster.storage import FileInfo

if TYPE_CHECKING:
    from vlm_dagster.history import SnapshotRef
    from vlm_dagster.pointers import PointerRef
    from vlm_dagster.sealed.owner import WindowedTable

__all__ = ["GcReport", "Holding", "KeptVersion", "find_holding", "gc", "opens_at"]

_MAX_TRIES = 10


@dataclass(frozen=True)
class KeptVersion:
    """A version that stays, and why.

    Attributes:
        at_s: when it was committed, UTC seconds; None if its commit was cleaned away.
        what: what committed it.
        num_bytes: of its files.
        own_bytes: of those of its files that no other kept version has.
        holds: what refers to it; none of the newest and of recent ones need any.
    """

    version: int
    at_s: float | None
    what: str
    num_bytes: int
    own_bytes: int
    holds: tuple[Hold, ...]


@dataclass(frozen=True)
class Holding:
    """What holds a table at one instant.

    Attributes:
        version: the newest.
        since: the oldest of the versions that are kept for being recent, up to the newest.
        recent_bytes: of files that only recent versions have: neither the newest nor a held one.
        kept: the newest and every held version, newest first.
        retired: as it is, and as it will be once everything else is let go.
        num_retired, num_to_retire: versions.
        moved: what held a version and is opened at the newest instead, after proof; or what named
            only windows that were dropped by age, and was let go.
        lost: what refers to a version that cannot be opened, and whose content no kept one has.
    """

    version: int
    since: int
    recent_bytes: int
    kept: tuple[KeptVersion, ...]
    retired: Retired
    retired_next: Retired
    num_retired: int
    num_to_retire: int
    moved: tuple[Hold, ...]
    lost: tuple[Hold, ...]
    references: References

    @property
    def vanished(self) -> tuple[Vanished, ...]:
        """Referrers that cannot be opened."""
        return self.references.vanished


@dataclass(frozen=True)
class GcReport:
    """What a collection did, or with `dry_run` would do.

    Attributes:
        purged: the files that went.
        unprotected: table properties that another writer changed, and their values; they were
            restored unless `dry_run`.
    """

    uri: str
    dry_run: bool
    holding: Holding
    purged: PurgeReport
    unprotected: dict[str, str | None]


class _ChangedError(Exception):
    """A pin or a referrer came or went while it was decided what to keep."""


def gc(
    owner: WindowedTable,
    *,
    dry_run: bool = True,
    keep_hours: float = 24.0,
    move_pins: bool = False,
    let_dropped_go: bool = False,
    verify: bool = False,
    forget: Sequence[str] = (),
    grace_s: float = DEFAULT_GRACE_S,
    progress: Callable[[FileInfo], None] | None = None,
) -> GcReport:
    """Let go of every version that nothing refers to; see `WindowedTable.gc`."""
    if isinstance(keep_hours, bool) or not keep_hours >= 0:
        raise SchemaError(f"keep_hours={keep_hours!r}", "Use a number of 0 or more.")
    table = owner.sealed_table
    if verify and move_pins:
        _check_intact(table)
    for _ in range(_MAX_TRIES):
        inputs = _inputs(table)
        lifetimes = Lifetimes(table)
        holding = find_holding(
            owner,
            lifetimes,
            keep_hours=keep_hours,
            move_pins=move_pins,
            let_dropped_go=let_dropped_go,
            forget=forget,
        )
        unprotected = missing_protection(table)
        files, num_spared = collectable(table, lifetimes, holding.retired_next, grace_s=grace_s)
        as_it_is, _ = collectable(table, lifetimes, holding.retired, grace_s=grace_s)
        if all(info.path.startswith("_retired/") for info in {*files} - {*as_it_is}):
            # A commit that frees nothing but the record of the one before would go on for ever.
            holding = replace(holding, retired_next=holding.retired, num_to_retire=0)
            files = as_it_is
        if dry_run:
            found = PurgeReport(lifetimes.newest, tuple(files), num_spared, True)
            return GcReport(table.uri, True, holding, found, unprotected)

        def still(seen: frozenset[tuple[str, float]] = inputs) -> None:
            if _inputs(table) != seen:
                raise _ChangedError

        try:
            if holding.retired_next != holding.retired:
                following = holding.retired_next
                retire(table, following.below, following.keep, "gc", still=still)
        except _ChangedError:
            continue
        if unprotected:
            restore_protection(table)
        forget_referrers(table, [one.referrer for one in holding.references.forgotten])
        purged = purge(table, grace_s=grace_s, progress=progress)
        return GcReport(table.uri, False, holding, purged, unprotected)
    raise StorageError(
        table.uri,
        f"collecting ({_MAX_TRIES} tries, its pins or referrers kept changing)",
        RuntimeError("run it again"),
    )


def find_holding(
    owner: WindowedTable,
    lifetimes: Lifetimes,
    *,
    keep_hours: float = 24.0,
    move_pins: bool = False,
    let_dropped_go: bool = False,
    forget: Sequence[str] = (),
) -> Holding:
    """What holds which version, and what would be let go."""
    table = owner.sealed_table
    newest = table.state(lifetimes.newest)
    references = find_references(owner, forget)
    held: dict[int, list[Hold]] = {}
    moved: list[Hold] = []
    lost: list[Hold] = []
    for hold in references.holds:
        version: int | None = hold.version
        if hold.version in newest.retired:
            if let_dropped_go and _lacks_only_dropped(newest, hold.pin):
                moved.append(hold)
                continue
            version = opens_at(owner, newest, hold)
        elif not lifetimes.can_open(hold.version):
            # Another writer cleaned its log away. If it is retired, it opens where it is proved.
            if holds_content(newest, hold.pin):
                moved.append(hold)
                continue
            lost.append(hold)  # its files stay all the same: its log may be restored
        elif hold.version < newest.version and (
            (move_pins and holds_rows(newest, hold.pin, table.state(hold.version)))
            or (let_dropped_go and _lacks_only_dropped(newest, hold.pin))
        ):
            moved.append(hold)
            continue
        if version is None and _lacks_only_dropped(newest, hold.pin):
            moved.append(hold)  # all that it showed has been dropped, and was let go then
        elif version is None:
            lost.append(hold)
        else:
            held.setdefault(version, []).append(hold)
    since = max(_recent_since(lifetimes, keep_hours), newest.retired.below)
    retired_next = newest.retired
    if not references.holds_all:
        retired_next = newest.retired.further(since, list(held), "gc")
    counted = _Counted(lifetimes, retired_next, set(held) | {newest.version})
    return Holding(
        version=newest.version,
        since=since,
        recent_bytes=counted.recent_bytes,
        kept=tuple(
            KeptVersion(
                version=version,
                at_s=None if commit is None else commit.at_s,
                what="" if commit is None else commit.what,
                num_bytes=counted.num_bytes[version],
                own_bytes=counted.own_bytes[version],
                holds=tuple(held.get(version, ())),
            )
            for version in sorted({*held, newest.version}, reverse=True)
            for commit in [lifetimes.commits.get(version)]
        ),
        retired=newest.retired,
        retired_next=retired_next,
        num_retired=newest.retired.below - len(newest.retired.keep),
        num_to_retire=(retired_next.below - len(retired_next.keep))
        - (newest.retired.below - len(newest.retired.keep)),
        moved=tuple(moved),
        lost=tuple(lost),
        references=references,
    )


def _lacks_only_dropped(newest: TableState, pin: SnapshotRef | PointerRef) -> bool:
    """Whether the newest version holds what a pin names, but for windows dropped by age since."""
    dropped = any(one.kind == "drop" for one in newest.gone.removals)
    return dropped and holds_content(newest, pin)


class _Counted:
    """Bytes by version that is kept for a reason: all of them, and those that no other has.

    Recent versions count as one: what only some of them hold goes when they are no longer recent.
    """

    def __init__(self, lifetimes: Lifetimes, retired: Retired, named: set[int]) -> None:
        self.num_bytes = dict.fromkeys(named, 0)
        self.own_bytes = dict.fromkeys(named, 0)
        self.recent_bytes = 0
        # A version that is kept so far, though nothing holds it any more, is not among the named.
        ordered = sorted(named)
        for path, spans in lifetimes.files():
            size = lifetimes.num_bytes[path]
            having = [
                version
                for first, end in spans
                for version in ordered[bisect_left(ordered, first) : bisect_left(ordered, end)]
            ]
            for version in having:
                self.num_bytes[version] += size
            if len(having) == 1:
                self.own_bytes[having[0]] += size
            elif not having and any(
                end > max(retired.below, first) and end != FOREVER for first, end in spans
            ):
                self.recent_bytes += size


def opens_at(owner: WindowedTable, newest: TableState, hold: Hold) -> int | None:
    """Where a pin to a retired version opens now; None if nowhere."""
    if holds_content(newest, hold.pin) and not newest.gone.removals:
        return newest.version
    try:
        return int(owner.pinned(hold.pin).version)
    except VlmError:
        return None


def _recent_since(lifetimes: Lifetimes, keep_hours: float) -> int:
    """The version that was the newest `keep_hours` ago."""
    version = lifetimes.newest
    if keep_hours == 0:
        return version
    limit = time.time() - keep_hours * 3600
    while version > 0:
        commit = lifetimes.commits.get(version)
        if commit is None or commit.at_s <= limit:
            break
        version -= 1
    return version


def _inputs(table: SealedTable) -> frozenset[tuple[str, float]]:
    """The pins and the entries of referrers, as they lie there."""
    return frozenset(
        (info.path, info.modified_s)
        for folder in (PINS, REFERRERS)
        for info in table.storage.list(folder)
        if info.path.endswith(".json")
    )


def _check_intact(table: SealedTable) -> None:
    found = verify_files(table, table.state().version)
    if not found.ok:
        raise CorruptFileError(
            table=table.uri,
            path="(the newest version)",
            version=found.version,
            problem=f"no pin was moved there, as it is not intact: {found.problems[0]}",
        )
