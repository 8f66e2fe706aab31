"""How long the sequences of examples are, read from the pointers alone: what cutting batches by tokens
needs to know before any history is read."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from vlm_dagster.errors import CorruptFileError
from vlm_dagster.history import Snapshot
from vlm_dagster.loaders.options import OrderOptions
from vlm_dagster.loaders.plan import Plan, Unit
from vlm_dagster.loaders.pool import ExampleKeys
from vlm_dagster.loaders.readable import read_asked
from vlm_dagster.pointers import PointerSnapshot
from vlm_dagster.schema import Projection

__all__ = ["Lengths"]


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
        asked = read_asked(
            pointers,
            self._histories,
            self._projections,
            unit.bucket,
            self._plan.users_of(unit),
            columns=["request_time"],
            whole=self._verify,
        ).only_readable()
        lengths = {}
        for group, projection in self._projections.items():
            length, most = asked.pointers[group]["length"], projection.max_length
            lengths[group] = length if most is None else np.minimum(length, most)
        found = ExampleKeys.of(
            pa.array(asked.rank),
            asked.columns["request_time"],
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
