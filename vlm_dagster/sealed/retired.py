"""Versions that are no longer kept: their files may be gone, and pins to them open a later version.

What a retired version held is not lost, as long as a later one holds the same content: a pin says which
content that is, and is moved forward when it is opened, after proof (`HistoryStore.pinned`). A version is
retired by a transaction before its first file is deleted, so a reader never takes a collected version
for a damaged one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from deltalake import CommitProperties, Transaction

from vlm_dagster.sealed.attempts import attempted
from vlm_dagster.sealed.sidecar import naming, put_sidecar, read_named
from vlm_dagster.storage import Storage
from vlm_dagster.windows import format_us

if TYPE_CHECKING:
    from vlm_dagster.sealed.log import TableState
    from vlm_dagster.sealed.table import SealedTable

__all__ = ["Retired", "kept_versions", "read_retired", "retire"]

RETIRED_ID = "vlm.retired"
# Carried by whoever retires versions and by whoever pins one: of two at the same instant, one looks again.
HOLDS_ID = "vlm.holds"
_FOLDER = "_retired"
_FORMAT = 1


@dataclass(frozen=True)
class Retired:
    """Which versions are retired: all below `below` but those in `keep`.

    Attributes:
        by: what retired the newest of them, e.g. "gc" or "erasure".
        at: when, as ISO 8601; empty if nothing was.
    """

    below: int = 0
    keep: frozenset[int] = frozenset()
    by: str = ""
    at: str = ""

    def __contains__(self, version: object) -> bool:
        return isinstance(version, int) and version < self.below and version not in self.keep

    def further(self, below: int, keep: Collection[int], by: str) -> Retired:
        """With all versions below `below` retired too, but those to keep. What is retired stays so;
        the very same value if that retires nothing more."""
        limit = max(below, self.below)
        # Asking for less than was retired before lets nothing go that is kept beyond it.
        wanted = {*keep, *(v for v in self.keep if v >= below)}
        kept = frozenset(v for v in wanted if v < limit and v not in self)
        if limit == self.below and kept == self.keep:
            return self
        return Retired(limit, kept, by, format_us(int(time.time() * 1e6)))


def read_retired(storage: Storage, transactions: Mapping[str, int]) -> Retired:
    """What is retired, from the transactions of a version."""
    facts = read_named(storage, transactions, RETIRED_ID, _FOLDER, _FORMAT)
    if facts is None:
        return Retired()
    return Retired(facts["below"], frozenset(facts["keep"]), facts["by"], facts["at"])


def kept_versions(table: SealedTable, newest: TableState) -> Iterator[int]:
    """The versions that are not retired, newest first; of a run of versions that hold the same windows
    with the same content and the same rows gone, or fewer windows, only the last."""
    yield newest.version
    for version in range(newest.version, newest.retired.below, -1):
        try:
            transactions = table.log.commit(version)
        except FileNotFoundError:  # cleaned away
            break
        for app_id, number in transactions.items():
            if app_id == "vlm.gone" or (app_id.startswith("vlm.window/") and number > 1):
                yield version - 1
                break
    yield from sorted(newest.retired.keep, reverse=True)


def retire(
    table: SealedTable,
    below: int,
    keep: Collection[int],
    by: str,
    *,
    still: Callable[[], None] = lambda: None,
) -> Retired:
    """Retire all versions below `below` but those to keep. What is retired already stays so.

    Args:
        by: what does it, e.g. "gc".
        still: called when the log is as it will be committed on: raises if what `keep` was made
            from has changed. A version that is pinned after that call is found by the log.

    Raises:
        StorageError: the commit could not be written.
    """

    def attempt() -> Retired:
        with table.newest.lent() as handle:
            transactions = table.log.transactions(int(handle.version()))
            still()
            before = read_retired(table.storage, transactions)
            found = before.further(below, keep, by)
            if found is before:
                return before
            facts = {**asdict(found), "format": _FORMAT, "keep": sorted(found.keep)}
            data = json.dumps(facts, sort_keys=True).encode()
            path = put_sidecar(table.storage, _FOLDER, data, ".json")
            number = transactions.get(RETIRED_ID, 0) + 1
            handle.create_write_transaction(
                [],
                "append",
                table.spec.delta_schema,
                ["segment", "bucket"],
                commit_properties=CommitProperties(
                    app_transactions=[
                        *naming(RETIRED_ID, number, path),
                        Transaction(HOLDS_ID, transactions.get(HOLDS_ID, 0) + 1),
                    ],
                    max_commit_retries=0,
                    custom_metadata={"vlm.retired": f"below {found.below}", "vlm.by": by},
                ),
            )
            return found

    return attempted(table.uri, "retiring versions", attempt)
