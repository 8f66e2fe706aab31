"""The declared policy for two rows with one id in one window."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Literal

import numpy as np
import pyarrow as pa

from vlm_dagster.errors import InvalidEventsError, InvalidRequestsError
from vlm_dagster.hashing import id_words, mix64

__all__ = ["DuplicateFilter"]


class DuplicateFilter:
    """Drops or refuses rows of one user with the same id; keeps the first in input order.

    Works on chunks that hold users whole, of several buckets at a time if need be. A 64-bit hash of
    (user, id) finds the candidates; only these, a handful at most, are then compared for real.
    """

    def __init__(
        self,
        id_column: str,
        policy: Literal["refuse", "first"],
        error: type[InvalidEventsError] | type[InvalidRequestsError] = InvalidEventsError,
    ) -> None:
        self._id = id_column
        self._policy = policy
        self._error = error
        self.num_duplicates = 0
        self._lock = threading.Lock()

    def __call__(self, chunks: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for chunk in chunks:
            extra = self._extra_rows(chunk)
            if extra:
                if self._policy == "refuse":
                    self._refuse(chunk, extra[0], len(extra))
                keep = np.ones(chunk.num_rows, bool)
                keep[extra] = False
                with self._lock:
                    self.num_duplicates += len(extra)
                chunk = chunk.filter(pa.array(keep))
            yield chunk

    def _extra_rows(self, chunk: pa.RecordBatch) -> list[int]:
        """The indices of all rows beyond the first of their (user, id), as given in the input."""
        keys = mix64(id_words(chunk.column("user_id")))
        keys ^= id_words(chunk.column(self._id))
        keys = mix64(keys)
        ordered = np.sort(keys)
        same = ordered[1:] == ordered[:-1]
        if not same.any():
            return []
        repeated = ordered[1:][same]
        rows = np.flatnonzero(np.isin(keys, repeated))
        some = chunk.take(pa.array(rows))
        users = some.column("user_id").to_pylist()
        ids = some.column(self._id).to_pylist()
        order = some.column("row").to_numpy()
        seen: set[tuple[object, object]] = set()
        extra = []
        for i in np.argsort(order):
            key = (users[i], ids[i])
            if key in seen:
                extra.append(int(rows[i]))
            seen.add(key)
        return extra

    def _refuse(self, chunk: pa.RecordBatch, row: int, num_rows: int) -> None:
        user = chunk.column("user_id")[row].as_py()
        raise self._error(
            f"stands a second time for user {user!r} in this window",
            row=chunk.column("row")[row].as_py(),
            column=self._id,
            value=chunk.column(self._id)[row].as_py(),
            way_out="Remove the repeated rows, or declare duplicates='first' to keep the first and "
            "count the rest.",
            num_rows=num_rows,
        )
