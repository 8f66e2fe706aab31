"""Small files beside the data, named by their bytes, which a transaction of the log refers to.

Their folders begin with an underscore, so Delta and every vacuum leave them alone. A sidecar is put
in place before the commit that names it, and never changes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from deltalake import Transaction

from vlm_dagster.errors import CorruptFileError, TableError
from vlm_dagster.storage import Storage

__all__ = ["naming", "put_sidecar", "read_named", "read_sidecar"]


def put_sidecar(storage: Storage, folder: str, data: bytes, suffix: str) -> str:
    """Put a sidecar in place, unless it is there; returns its path."""
    path = f"{folder}/{hashlib.sha256(data).hexdigest()}{suffix}"
    if not storage.put_new(data, path):
        # Put again: one that no commit names is collected when it is a day old, and this one is
        # about to be named.
        with storage.scratch() as scratch:
            local = scratch / "sidecar"
            local.write_bytes(data)
            storage.put(local, path)
    return path


def read_sidecar(storage: Storage, path: str, version: int | None = None) -> bytes:
    """The bytes of a sidecar.

    Raises:
        CorruptFileError: it is missing, or not what was written.
    """
    problem = "is missing"
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        pass
    else:
        found = hashlib.sha256(data).hexdigest()
        if path.rpartition("/")[2].partition(".")[0] == found:
            return data
        problem = f"its bytes hash to {found}, not to its name"
    raise CorruptFileError(table=storage.uri, path=path, version=version, problem=problem)


def naming(app_id: str, number: int, path: str) -> list[Transaction]:
    """What a commit must carry to name a sidecar as the newest one of its kind."""
    name = path.rpartition("/")[2]
    return [Transaction(app_id, number), Transaction(f"{app_id}/{number}/{name}", 1)]


def read_named(
    storage: Storage, transactions: Mapping[str, int], app_id: str, folder: str, newest_format: int
) -> dict[str, Any] | None:
    """The newest JSON sidecar of a kind, as the transactions of a version name it; None if they
    name none.

    Raises:
        CorruptFileError: it is missing, or not what was written.
        TableError: its format is newer than this code.
    """
    number = transactions.get(app_id)
    if number is None:
        return None
    prefix = f"{app_id}/{number}/"
    (name,) = (key[len(prefix) :] for key in transactions if key.startswith(prefix))
    found: dict[str, Any] = json.loads(read_sidecar(storage, f"{folder}/{name}"))
    if found["format"] > newest_format:
        raise TableError(
            storage.uri,
            f"{folder}/{name} has format {found['format']}, newer than this code's {newest_format}",
            "Upgrade vlm-dagster.",
        )
    return found
