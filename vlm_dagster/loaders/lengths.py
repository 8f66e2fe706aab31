"""How long the sequences of examples are, read from the pointers alone: what cutting batches by tokens
needs to know before any history is read."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vlm_dagster.errors import CorruptFileError
from vlm_dagster.history import Snapshot
from vlm_dagster.loaders.options import OrderOptions
from vlm_dagster.loaders.plan import Plan, Unit
from vlm_dagster.loaders.pool import ExampleKeys
from vlm_dagster.loaders.readable import readable
from vlm_dagster.pointers import PointerSnapshot
from vlm_dagster.pointers.spec import pointer_fields
from vlm_dagster.schema import Projection

__all__ = ["Lengths"]

I64 = npt.NDArray[np.int64]


class Lengths:
    """The keys of a plan's examples, unit by unit; kept once read: 4 bytes an example, and 8 more where
    they are ordered by time.

    Args:
        verify: whether checksums will be verified, which decides what examples can be rebuilt.
        options: of the order, which decide what has to be known.
        drop_bad: where pointers cannot be read, take their examples for empty, of one user; reading will
            leave them out.
    """

    def __init__(
        self,
        plan: Plan,
        pointers: PointerSnapshot,
        histories: Mapping[str, Snapshot],
        projections: Mapping[str, Projection],
        *,
        verify: bool,
        options: OrderOptions,
        drop_bad: bool = False,
    ) -> None:
        self._plan = plan
        self._pointers = pointers
        self._histories = histories
        self._projections = projections
        self._verify = verify
        self._options = options
        self._drop_bad = drop_bad
        self._found: dict[int, ExampleKeys] = {}

    def of(self, unit: int) -> ExampleKeys:
        """Of the examples of a unit, in file order."""
        if unit not in self._found:
            try:
                self._found[unit] = self._read(self._plan.units[unit])
            except CorruptFileError:
                if not self._drop_bad:
                    raise
                self._found[unit] = ExampleKeys.unknown(self._plan.units[unit].num_examples)
        return self._found[unit]

    def _read(self, unit: Unit) -> ExampleKeys:
        pointers = self._pointers if unit.window is None else self._pointers.only(unit.window)
        users = self._plan.users_of(unit)
        index = pointers.bucket_index(unit.bucket, users)
        counts = index.num_events
        fields = {group: pointer_fields(group) for group in self._projections}
        names = [f[part] for f in fields.values() for part in ("end_position", "length")]
        read = index.read(["request_time", *names], np.zeros_like(counts), counts)
        rank = np.repeat(np.arange(len(users)), counts)
        keep = np.ones(len(rank), bool)
        lengths = {}
        for group, projection in self._projections.items():
            end, length = (
                np.asarray(read.columns[fields[group][part]]) for part in ("end_position", "length")
            )
            gone = self._histories[group].gone_of(users)
            most = projection.max_length
            keep &= readable(gone, rank, end, length, most, verify=self._verify)
            lengths[group] = length if most is None else np.minimum(length, most)
        if not keep.all():
            lengths = {group: length[keep] for group, length in lengths.items()}
        kept = pa.array(keep)
        found = ExampleKeys.of(
            pa.array(rank).filter(kept),
            read.columns["request_time"].filter(kept),
            lengths,
            self._options.balance_length,
        )
        nothing = np.broadcast_to(np.int64(0), found.tokens.shape)
        options = self._options
        return ExampleKeys(
            found.user_ends,
            found.request_time if options.order == "time" else nothing,
            found.tokens.astype(np.int32),
            found.flops if options.balance == "flops" else nothing,
        )
