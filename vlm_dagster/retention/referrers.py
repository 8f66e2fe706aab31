"""Who refers to a table: pointer datasets and checkpoints enter themselves before they refer to it.

An entry is a file in the table, `_referrers/KIND-....json`, named by what it says, so entering again
changes nothing. A pointer dataset enters itself in every history that it points into before it
commits a window; a training run enters its folder, and what it pins, before it begins. So a
collection knows all that may refer to a table, without anybody having to remember.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vlm_dagster.errors import StorageError, TableError
from vlm_dagster.sealed.table import SealedTable
from vlm_dagster.storage import Storage, normalize_uri, redact
from vlm_dagster.windows import format_us

__all__ = [
    "Referrer",
    "forget",
    "matches",
    "read_referrers",
    "register",
    "registered",
    "unregister",
]

FOLDER = "_referrers"
_FORMAT = 1


@dataclass(frozen=True)
class Referrer:
    """An entry. Holds no credentials.

    Attributes:
        kind: "pointers": a pointer dataset. "checkpoint": the folder of one, or one with checkpoints
            somewhere below.
        uri: where it lies.
        table_id: of a pointer dataset; else empty.
        pins: of a checkpoint, by role, the `PointerRef.to_json()` that it was, or will be, trained on;
            empty if that was not known when it was entered.
        registered_s: when it was entered, UTC seconds.
    """

    kind: Literal["pointers", "checkpoint"]
    uri: str
    table_id: str = ""
    pins: Mapping[str, Any] = field(default_factory=dict, hash=False)
    registered_s: float = field(default=0.0, compare=False)

    @classmethod
    def pointers(cls, uri: str, table_id: str) -> Referrer:
        """A pointer dataset."""
        return cls("pointers", redact(uri), table_id)

    @classmethod
    def checkpoint(cls, folder: str, pins: Mapping[str, Any] | None = None) -> Referrer:
        """A checkpoint's folder, and what the checkpoint pins, if that is known."""
        return cls("checkpoint", redact(normalize_uri(folder)), pins=dict(pins or {}))

    @property
    def path(self) -> str:
        """Where its entry lies in a table."""
        name = f"{self.kind}-{_short(self.uri)}"
        if self.kind == "pointers":
            name = f"pointers-{self.table_id}-{_short(self.uri)}"
        elif self.pins:
            name += f"-{_short(json.dumps(self.pins, sort_keys=True))}"
        return f"{FOLDER}/{name}.json"

    def __str__(self) -> str:
        return f"{'pointer dataset' if self.kind == 'pointers' else 'checkpoint'} {self.uri}"


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def registered(storage: Storage, referrer: Referrer) -> bool:
    """Whether a referrer stands in a table: itself, or, of a checkpoint, a folder around it."""
    if storage.size(referrer.path) is not None:
        return True
    if referrer.kind == "pointers":
        return False
    around = referrer.uri
    while around:
        if storage.size(Referrer("checkpoint", around).path) is not None:
            return True
        shorter = around.rpartition("/")[0]
        around = "" if shorter.endswith(("/", ":")) else shorter
    return False


def register(table: SealedTable, referrer: Referrer) -> bool:
    """Enter a referrer, unless it is there; returns whether it was entered now.

    Raises:
        TableError: the table cannot be written.
    """
    if registered(table.storage, referrer):
        return False
    entry = {
        "format": _FORMAT,
        "kind": referrer.kind,
        "uri": referrer.uri,
        "table_id": referrer.table_id,
        "pins": referrer.pins,
        "registered_at": format_us(int(time.time() * 1e6)),
    }
    try:
        return table.storage.put_new(
            json.dumps(entry, indent=2, sort_keys=True).encode(), referrer.path
        )
    except StorageError as error:
        raise TableError(
            table.uri,
            f"{referrer} cannot be entered among its referrers, so nothing would keep the versions "
            f"that it refers to ({error.__cause__ or error})",
            "Let somebody who may write there enter it, once: `vlm-dagster refer "
            f"{table.uri} {referrer.uri}`.",
        ) from error


def unregister(table: SealedTable, referrer: Referrer) -> None:
    """Take an entry back."""
    table.storage.delete(referrer.path)


def read_referrers(table: SealedTable) -> list[Referrer]:
    """All entries, in order of kind and address."""
    found = []
    for info in table.storage.list(FOLDER):
        if info.path.endswith(".json"):
            try:
                found.append(
                    _parse(table, info.path, table.storage.read_bytes(info.path), info.modified_s)
                )
            except FileNotFoundError:  # forgotten just now
                continue
    return sorted(found, key=lambda one: (one.kind, one.uri, one.path))


def _parse(table: SealedTable, path: str, data: bytes, modified_s: float) -> Referrer:
    try:
        value = json.loads(data)
        number, kind = int(value["format"]), value["kind"]
        found = Referrer(kind, value["uri"], value["table_id"], value["pins"], modified_s)
    except (ValueError, KeyError, TypeError) as error:
        raise TableError(
            table.uri,
            f"{path} is no entry of a referrer ({error!r})",
            "Restore it from a copy, or enter the referrer again with `vlm-dagster refer` and "
            "delete that file.",
        ) from None
    if number > _FORMAT or kind not in ("pointers", "checkpoint"):
        raise TableError(
            table.uri, f"{path} is of kind {kind!r} and format {number}", "Upgrade vlm-dagster."
        )
    return found


def matches(referrer: Referrer, patterns: Iterable[str]) -> bool:
    """Whether a referrer's address is one of these, which may hold `*`."""
    return any(
        referrer.uri == pattern.rstrip("/") or fnmatch.fnmatchcase(referrer.uri, pattern)
        for pattern in patterns
    )


def forget(table: SealedTable, referrers: Sequence[Referrer]) -> None:
    """Delete the entries of referrers."""
    for referrer in referrers:
        table.storage.delete(referrer.path)
