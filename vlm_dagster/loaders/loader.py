"""SequenceLoader: epochs of batches over a pinned pointer dataset, and the place within one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from vlm_dagster.errors import PinError, SchemaError
from vlm_dagster.history import ArenaBuffers, SnapshotRef
from vlm_dagster.loaders import graph
from vlm_dagster.loaders.batch import Batch
from vlm_dagster.loaders.forming import BatchFormer, UnitsInMemory
from vlm_dagster.loaders.materialize import UnitData, materialize
from vlm_dagster.loaders.pins import open_histories, tensor_columns
from vlm_dagster.loaders.plan import Chunk, Unit, make_plan
from vlm_dagster.pointers import PointerRef, PointerSnapshot
from vlm_dagster.schema import Projection

__all__ = ["SequenceLoader"]

I64 = npt.NDArray[np.int64]

STATE_VERSION = 1


class SequenceLoader:
    """Iterates over batches of examples with their histories rebuilt, in a reproducible order.

    One pass of `for batch in loader` is one epoch. Each user's histories are read and decoded once
    a unit and serve all of its examples. Every rank plans the same; chunks go to ranks in turn.

    Attributes:
        epoch: the epoch that the next pass goes over; grows by one with every pass.
    """

    def __init__(
        self,
        pointers: PointerRef | PointerSnapshot,
        projections: Mapping[str, Projection],
        batch_size: int = 256,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        uneven: Literal["keep", "drop", "repeat"] = "keep",
        verify: Literal["always", "off"] = "always",
        gone: Literal["fail", "drop"] = "fail",
        num_workers: int = 2,
        prefetch: int = 2,
        pin_memory: bool = False,
        examples_per_unit: int = 1024,
        events_per_unit: int = 500_000,
        units_per_chunk: int = 64,
        events_per_chunk: int = 2_000_000,
        histories: Mapping[str, str] | None = None,
        storage_options: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            pointers: the pinned examples.
            projections: what to read of each group; groups left out are not read.
            batch_size: examples a batch, per rank.
            seed: of the shuffle, together with the epoch.
            shuffle: False goes by bucket, user and request time.
            uneven: what happens when ranks have different numbers of batches: "keep" them (every
                example exactly once), "drop" the surplus, or "repeat" a rank's first ones.
            verify: recompute each pointer's checksum while reading, or not.
            gone: what happens where examples point at events that were erased, or dropped by age:
                "fail" at once, or "drop" these examples and count them in `num_dropped`.
            num_workers: threads that read and decode.
            prefetch: batches ready ahead.
            pin_memory: page-lock batches, for transfers to a GPU.
            examples_per_unit, events_per_unit: what is read at once, at most (or one user).
            units_per_chunk, events_per_chunk: how many units' examples are shuffled with each
                other, at most (or one unit); memory grows with it, and so does randomness.
            histories: where the groups' tables lie now, if they were moved since pinning.
            storage_options: as deltalake takes them.

        Raises:
            SchemaError: an option or a projection does not fit.
            TableError, PinError: what is pinned is gone or has changed.
            GoneError: events that were pointed at are gone, and `gone` is "fail".
        """
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("world_size", world_size, 1),
            ("num_workers", num_workers, 0),
            ("prefetch", prefetch, 0),
            ("examples_per_unit", examples_per_unit, 1),
            ("events_per_unit", events_per_unit, 1),
            ("units_per_chunk", units_per_chunk, 1),
            ("events_per_chunk", events_per_chunk, 1),
            ("seed", seed, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise SchemaError(f"{name}={value!r}", f"Use an integer of {least} or more.")
        if not 0 <= rank < world_size:
            raise SchemaError(
                f"rank={rank!r} with world_size={world_size}", "Ranks go from 0 to world_size - 1."
            )
        if uneven not in ("keep", "drop", "repeat"):
            raise SchemaError(f"uneven={uneven!r}", "Use 'keep', 'drop' or 'repeat'.")
        if verify not in ("always", "off"):
            raise SchemaError(f"verify={verify!r}", "Use 'always' or 'off'.")
        if gone not in ("fail", "drop"):
            raise SchemaError(f"gone={gone!r}", "Use 'fail' or 'drop'.")
        self._pointers = (
            pointers.open(storage_options) if isinstance(pointers, PointerRef) else pointers
        )
        self._projections = dict(projections)
        self._histories = open_histories(
            self._pointers, list(self._projections), histories or {}, storage_options
        )
        self._traits: dict[str, list[str]] = {}
        for group, projection in self._projections.items():
            self._traits[group] = tensor_columns(self._histories[group], projection)
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._shuffle = shuffle
        self._uneven = uneven
        self._verify = verify == "always"
        self._num_workers = num_workers
        self._buffers = ArenaBuffers()
        self._prefetch = prefetch
        self._pin_memory = pin_memory
        self._chunk_limits = (units_per_chunk, events_per_chunk)
        self._unit_limits = (examples_per_unit, events_per_unit)
        self._plan = make_plan(
            self._pointers,
            self._histories,
            self._projections,
            examples_per_unit=examples_per_unit,
            events_per_unit=events_per_unit,
            verify=self._verify,
            drop_gone=gone == "drop",
        )
        self.epoch = 0
        self._num_done = 0
        self._schema = self._pointers.spec.schema
        self._columns = [
            "user_id",
            "request_id",
            "request_time",
            *(trait.name for trait in self._pointers.spec.columns),
        ]

    # -- what there is --------------------------------------------------------------------------

    @property
    def num_examples(self) -> int:
        """The examples of an epoch, of all ranks together."""
        return self._plan.num_examples

    @property
    def num_dropped(self) -> int:
        """The examples of an epoch that are left out, because events they point at are gone."""
        return self._plan.num_gone

    @property
    def histories(self) -> dict[str, SnapshotRef]:
        """The snapshot of each group that sequences are rebuilt from."""
        return {group: snapshot.ref() for group, snapshot in self._histories.items()}

    def __len__(self) -> int:
        """The batches that this rank gets in the present epoch, from its beginning."""
        return self._num_batches([c.num_examples for c in self._chunks_of_all()], self._rank)

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise SchemaError(f"epoch={epoch!r}", "Use an integer of 0 or more.")
        self.epoch = epoch
        self._num_done = 0

    def _chunks_of_all(self) -> list[Chunk]:
        return self._plan.chunks(
            seed=self._seed,
            epoch=self.epoch,
            shuffle=self._shuffle,
            units_per_chunk=self._chunk_limits[0],
            events_per_chunk=self._chunk_limits[1],
        )

    def _num_batches(self, sizes: Sequence[int], rank: int) -> int:
        batches = [
            -(-sum(sizes[r :: self._world_size]) // self._batch_size)
            for r in range(self._world_size)
        ]
        if self._uneven == "keep":
            return batches[rank]
        if self._uneven == "drop":
            return min(batches)
        if min(batches) == 0 and max(batches) > 0:
            raise SchemaError(
                f"rank {batches.index(0)} of {self._world_size} has no examples to repeat",
                "Use fewer ranks, or smaller examples_per_unit or units_per_chunk.",
            )
        return max(batches)

    # -- iterating ------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the present epoch; the whole of it unless resumed within."""
        chunks = self._chunks_of_all()
        limit = self._num_batches([c.num_examples for c in chunks], self._rank)
        mine = chunks[self._rank :: self._world_size]
        if (
            limit * self._batch_size > sum(c.num_examples for c in mine)
            and self._uneven == "repeat"
        ):
            mine = mine * -(-limit * self._batch_size // sum(c.num_examples for c in mine))
        skip = self._num_done * self._batch_size
        first = 0
        while first < len(mine) and skip >= mine[first].num_examples:
            skip -= mine[first].num_examples
            first += 1
        node = graph.epoch_graph(
            mine[first:],
            partial(self._read, self.epoch),
            BatchFormer(self._columns, self._traits),
            batch_size=self._batch_size,
            skip=skip,
            num_workers=self._num_workers,
            prefetch=self._prefetch,
            pin_memory=self._pin_memory,
        )
        batches = graph.run(node)
        try:
            while self._num_done < limit:
                batch = next(batches)
                self._num_done += 1
                yield batch
        finally:
            # Dropping the graph stops its threads, also after an early break.
            del batches, node
        self.set_epoch(self.epoch + 1)

    def _read(self, epoch: int, chunk: Chunk) -> UnitsInMemory:
        units = [self._read_unit(unit) for unit in chunk.units]
        total = sum(unit.num_examples for unit in units)
        order = np.arange(total)
        if self._shuffle:
            key = np.random.SeedSequence([self._seed, epoch, chunk.number])
            order = np.random.Generator(np.random.Philox(key)).permutation(total)
        return UnitsInMemory(units, order)

    def _read_unit(self, unit: Unit) -> UnitData:
        return materialize(
            self._pointers,
            self._histories,
            self._projections,
            unit.bucket,
            self._plan.users_of(unit),
            columns=self._columns,
            verify=self._verify,
            buffers=self._buffers,
        )

    # -- stopping and going on ------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """A digest of all that decides which batches come: pins, projections, options."""
        facts = {
            "pointers": self._pointers.digest,
            # Less where users were erased, or events dropped, since the pointers were sealed.
            "num_examples": self.num_examples,
            "histories": {g: s.digest for g, s in sorted(self._histories.items())},
            "projections": {g: p.to_json() for g, p in sorted(self._projections.items())},
            "batch_size": self._batch_size,
            "seed": self._seed,
            "rank": self._rank,
            "world_size": self._world_size,
            "shuffle": self._shuffle,
            "uneven": self._uneven,
            "unit_limits": self._unit_limits,
            "chunk_limits": self._chunk_limits,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Where this loader stands: after the last batch that it handed out."""
        return {
            "version": STATE_VERSION,
            "fingerprint": self.fingerprint,
            "epoch": self.epoch,
            "num_batches": self._num_done,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another loader of the same data and options stood.

        Raises:
            PinError: the state was made on other data or with other options.
        """
        if state.get("version") != STATE_VERSION:
            raise PinError(
                "loader state",
                pinned=f"version {state.get('version')}",
                found=f"version {STATE_VERSION}",
                way_out="It was made by another release: use that one, or start the epoch anew.",
            )
        if state["fingerprint"] != self.fingerprint:
            raise PinError(
                "loader state",
                pinned=state["fingerprint"],
                found=self.fingerprint,
                way_out="It was made on other data, projections or options, so other batches "
                "would come: make the loader as it was, or start anew.",
            )
        self.set_epoch(state["epoch"])
        self._num_done = state["num_batches"]
