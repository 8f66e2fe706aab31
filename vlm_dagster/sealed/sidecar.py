"""Small files beside the data, named by their bytes, which a transaction of the log refers to.

Their folders begin with an underscore, so Delta and every vacuum leave them alone. A sidecar is put
in place before the commit that names it, and never changes.
"""

from __future__ import annotations

import hashlib

from vlm_dagster.errors import CorruptFileError
from vlm_dagster.storage import Storage

__all__ = ["put_sidecar", "read_sidecar"]


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
