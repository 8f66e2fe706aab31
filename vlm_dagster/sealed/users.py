"""The index in a file's footer: its users and how many rows each has; where these lie follows."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vlm_dagster.sealed.stripes import Layout, Stripes

__all__ = ["Extreme", "UserIndex", "decode_users", "encode_users"]

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class UserIndex:
    """Which rows of a file are whose.

    Attributes:
        user_ids: [U] ascending.
        counts: [U] rows of each user.
        stripes: how the rows are laid out.
        extremes: what the table's owner keeps about each user beside, [U] each: the least or
            greatest value of a quantity over the user's rows.
    """

    user_ids: pa.Array
    counts: I64
    stripes: Stripes
    extremes: dict[str, I64]

    @cached_property
    def layout(self) -> Layout:
        """Which rows of the file are whose."""
        return self.stripes.layout(self.counts)

    @property
    def num_bytes(self) -> int:
        """What this object holds in memory once the layout is known, roughly."""
        arrays = 1 + len(self.extremes) + 3 * self.stripes.num_bands
        return int(self.user_ids.nbytes) + arrays * self.counts.nbytes


@dataclass(frozen=True)
class Extreme:
    """A quantity of a row whose least ("min") or greatest ("max") is kept for every user: the
    value of column `plus`, less that of column `minus` if given."""

    name: str
    keep: Literal["min", "max"]
    plus: str
    minus: str | None = None

    def of(self, rows: pa.RecordBatch, user_starts: I64) -> I64:
        """[U] over runs of rows that begin at `user_starts`."""
        values = rows.column(self.plus).to_numpy(zero_copy_only=False)
        if self.minus is not None:
            values = values - rows.column(self.minus).to_numpy(zero_copy_only=False)
        reduce = np.minimum if self.keep == "min" else np.maximum
        return np.asarray(reduce.reduceat(values, user_starts), np.int64)


def encode_users(users: pa.RecordBatch) -> bytes:
    """The index of a file's users as the text that its footer holds."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(
        sink, users.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")
    ) as writer:
        writer.write_batch(users)
    return base64.b64encode(sink.getvalue())


def decode_users(raw: bytes, stripes: Stripes) -> UserIndex:
    """The index that `encode_users` wrote."""
    # Handing columns of a few kilobytes to other threads costs more than decompressing them.
    options = pa.ipc.IpcReadOptions(use_threads=False)
    (batch,) = pa.ipc.open_stream(base64.b64decode(raw), options=options)
    columns = {
        name: batch.column(name).to_numpy().astype(np.int64) for name in batch.schema.names[1:]
    }
    counts = columns.pop("num_rows")
    return UserIndex(batch.column("user_id"), counts, stripes, columns)
