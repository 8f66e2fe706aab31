"""Named pins: versions that a person wants kept, whatever else refers to them.

A pin is a file in the table, `_pins/NAME.json`. Making one also commits an empty transaction: of a
pin and a collection at the same instant one looks again, so a version is never retired under a pin
that was just made.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from deltalake import CommitProperties, Transaction

from vlm_dagster.errors import PinError, RetiredVersionError, SchemaError, TableError
from vlm_dagster.sealed.attempts import attempted
from vlm_dagster.sealed.retired import HOLDS_ID, read_retired
from vlm_dagster.sealed.table import SealedTable
from vlm_dagster.windows import format_us

__all__ = ["NamedPin", "find_pin", "pin_version", "read_pins", "unpin"]

FOLDER = "_pins"
_FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class NamedPin:
    """A version under a name.

    Attributes:
        ref: the `SnapshotRef` or `PointerRef` of what it names, as JSON.
        created_at: ISO 8601.
    """

    name: str
    version: int
    reason: str
    created_at: str
    ref: Mapping[str, Any] = field(hash=False)

    @property
    def path(self) -> str:
        return f"{FOLDER}/{self.name}.json"

    @property
    def digest(self) -> str:
        return str(self.ref["digest"])


def pin_version(
    table: SealedTable, name: str, ref: Mapping[str, Any], reason: str = ""
) -> NamedPin:
    """Name a version, so that it is kept. The same again changes nothing.

    Args:
        name: letters, digits, `.`, `_` and `-`; up to 100.
        ref: the pin of that version of this table, as JSON.

    Raises:
        PinError: the name is taken by something else.
        RetiredVersionError: the version is not kept any more.
    """
    _check_name(name)
    version = int(ref["version"])
    now = format_us(int(time.time() * 1e6))
    made = NamedPin(name, version, reason, now, dict(ref))
    data = json.dumps({"format": _FORMAT, **asdict(made)}, indent=2, sort_keys=True).encode()
    written = False

    def attempt() -> NamedPin:
        nonlocal written
        handle = table.handle()
        newest = int(handle.version())
        transactions = table.log.transactions(newest)
        retired = read_retired(table.storage, transactions)
        if version in retired:
            if written:
                table.storage.delete(made.path)
            raise RetiredVersionError(
                table=table.uri,
                version=version,
                by=retired.by,
                at=retired.at,
                way_out=f"Pin one that `vlm-dagster inspect {table.uri}` lists, e.g. the newest, "
                f"{newest}.",
            )
        if not written and not table.storage.put_new(data, made.path):
            return _same(table, find_pin(table, name), made)
        written = True
        handle.create_write_transaction(
            [],
            "append",
            table.spec.delta_schema,
            ["segment", "bucket"],
            commit_properties=CommitProperties(
                app_transactions=[Transaction(HOLDS_ID, transactions.get(HOLDS_ID, 0) + 1)],
                max_commit_retries=0,
                custom_metadata={"vlm.pin": f"{name} of version {version}"},
            ),
        )
        return made

    return attempted(table.uri, f"pinning version {version} as {name!r}", attempt)


def _same(table: SealedTable, found: NamedPin, wanted: NamedPin) -> NamedPin:
    if (found.version, found.digest) == (wanted.version, wanted.digest):
        return found
    raise PinError(
        f"pin {wanted.name!r} of {table.uri}",
        pinned=f"version {found.version}",
        found=f"a request to pin version {wanted.version}",
        way_out=f"Choose another name, or let it go first: `vlm-dagster unpin {table.uri} "
        f"{wanted.name}`.",
    )


def read_pins(table: SealedTable) -> list[NamedPin]:
    """All named pins, by name."""
    paths = [info.path for info in table.storage.list(FOLDER) if info.path.endswith(".json")]
    found = []
    for path in sorted(paths):
        try:
            found.append(_parse(table, path, table.storage.read_bytes(path)))
        except FileNotFoundError:  # let go just now
            continue
    return found


def find_pin(table: SealedTable, name: str) -> NamedPin:
    """The pin of a name, or PinError."""
    _check_name(name)
    path = f"{FOLDER}/{name}.json"
    try:
        return _parse(table, path, table.storage.read_bytes(path))
    except FileNotFoundError:
        names = ", ".join(pin.name for pin in read_pins(table)) or "none"
        raise PinError(
            f"{table.uri}",
            pinned=f"names: {names}",
            found=f"no pin {name!r}",
            way_out="Name one of these, or pin a version with `vlm-dagster pin`.",
        ) from None


def unpin(table: SealedTable, name: str) -> NamedPin:
    """Let a named pin go; its version goes with the next collection, unless something else holds it.

    Raises:
        PinError: there is none of that name.
    """
    found = find_pin(table, name)
    table.storage.delete(found.path)
    return found


def _parse(table: SealedTable, path: str, data: bytes) -> NamedPin:
    try:
        value = json.loads(data)
        number = value.pop("format")
        found = NamedPin(**value)
        _ = found.digest, found.ref["table_id"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TableError(
            table.uri,
            f"{path} is no pin ({error})",
            "Restore it from a copy, or delete that file if nothing needs it.",
        ) from None
    if number > _FORMAT:
        raise TableError(
            table.uri,
            f"{path} has format {number}, newer than this code's {_FORMAT}",
            "Upgrade vlm-dagster.",
        )
    return found


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise SchemaError(
            f"pin name {name!r}",
            "Use up to 100 letters, digits, '.', '_' or '-', beginning with a letter or digit.",
        )
