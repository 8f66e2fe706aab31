"""SequenceLoader: epochs of batches over a pinned pointer dataset, and the place within one."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import pyarrow as pa
import torch
from torch.utils.data import IterableDataset

from vlm_dagster.errors import LoaderError, SchemaError
from vlm_dagster.history import ArenaBuffers, Snapshot, SnapshotRef
from vlm_dagster.loaders import graph
from vlm_dagster.loaders.batch import Batch
from vlm_dagster.loaders.cache import CachedSource
from vlm_dagster.loaders.cache_facts import CacheFacts
from vlm_dagster.loaders.epochs import Epoch, Epochs, Slots
from vlm_dagster.loaders.forming import BatchFormer
from vlm_dagster.loaders.lengths import Lengths
from vlm_dagster.loaders.options import (
    Balance,
    Form,
    OrderOf,
    OrderOptions,
    Uneven,
    check_choice,
    check_int,
)
from vlm_dagster.loaders.pins import open_histories, tensor_columns
from vlm_dagster.loaders.plan import make_plan
from vlm_dagster.loaders.processes import ProcessSource
from vlm_dagster.loaders.ranks import is_worker, rank_of_process, worker_of_process
from vlm_dagster.loaders.reading import Dropped, EpochReader, Verify
from vlm_dagster.loaders.report import Meter, Setup
from vlm_dagster.loaders.sources import DirectSource, ReadSpec, UnitSource
from vlm_dagster.loaders.state import LoaderFacts, Position
from vlm_dagster.loaders.steps import Share
from vlm_dagster.pointers import PointerRef, PointerSnapshot
from vlm_dagster.schema import Projection

__all__ = ["SequenceLoader"]

_LOG = logging.getLogger("vlm_dagster.loader")

_EXAMPLE_KEYS = ("user_id", "request_id", "request_time")


class SequenceLoader(IterableDataset[Batch]):
    """Iterates over batches of examples with their histories rebuilt, in a reproducible order.

    One pass of `for batch in loader` is one epoch. Each user's histories are read and decoded once
    a unit and serve all of its examples. The order of an epoch depends on the data, the options and
    the seed alone: ranks take its batches in turn, however many they are.

    It is an `IterableDataset` too: `DataLoader(loader, batch_size=None, num_workers=2,
    multiprocessing_context="spawn")` shares the batches of this rank out among its workers.

    Breaking out of a pass keeps the place: the next `for` goes on there; `set_epoch` begins an epoch.
    """

    def __init__(
        self,
        pointers: PointerRef | PointerSnapshot,
        projections: Mapping[str, Projection],
        batch_size: int = 256,
        *,
        form: Form = "expanded",
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        order: OrderOf = "shuffled",
        mix: int = 16,
        lanes: int | None = None,
        max_tokens: int | None = None,
        balance: Balance | None = None,
        balance_length: int = 1024,
        uneven: Uneven = "keep",
        verify: Verify = "always",
        gone: Literal["fail", "drop"] = "fail",
        bad: Literal["fail", "drop"] = "fail",
        workers: Literal["threads", "processes"] = "threads",
        num_workers: int = 2,
        prefetch: int = 2,
        pin_memory: bool = False,
        device: torch.device | str | None = None,
        examples_per_unit: int = 65_536,
        events_per_unit: int = 1_000_000,
        events_per_pool: int = 1_000_000,
        cache: str | os.PathLike[str] | None = None,
        cache_bytes: int = 64 << 30,
        histories: Mapping[str, str] | None = None,
        storage_options: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            pointers: the pinned examples.
            projections: what to read of each group; groups left out are not read.
            batch_size: examples a batch, per rank.
            form: of the sequences: "expanded", "views" or "deduplicated"; see `JaggedSequence`.
            seed: of the shuffle, together with the epoch.
            rank, world_size: this process among those that share out the epoch; None takes them from
                torch.distributed or torchrun, and is 0 of 1 without.
            order: "shuffled"; "stored", by bucket, user and request time; or "time": one window of the
                pointers after the other, units shuffled within it, each pool by request time.
            mix: how many units have their examples shuffled with each other: 0 keeps each user's
                examples together, 1 shuffles within a unit, many come close to independent draws.
                More cost memory, and share fewer events within a batch.
            lanes: how many pools batches are taken from in turn. Where the ranks' number divides it,
                each rank reads pools of its own; else several ranks read the same ones. Memory grows
                with lanes / world_size. None: 8, or 1 for order="stored".
            max_tokens: cut batches by events instead: at most so many of all groups, and at most
                `batch_size` examples. An example that alone has more is a batch by itself.
            balance: deal a pool's examples to its batches so that these, and so the ranks, cost about
                the same: by events ("tokens"), or weighted by sequence length ("flops").
            balance_length: for "flops", the length at which attention costs as much as all else.
            uneven: what happens at the end, where batches cannot be shared out evenly: "keep" gives
                every example exactly once, so some ranks get one batch more, and the last batch may
                be smaller; "drop" leaves these out; "repeat" fills up with the epoch's first examples;
                "pad" fills up with empty examples (`Batch.num_padding`).
            verify: recompute each pointer's checksum while reading: "always", for a "sampled" sixteenth
                of the units, other ones in every epoch, or "off".
            gone: what happens where examples point at events that were erased, or dropped by age:
                "fail" at once, or "drop" these examples and count them in `num_dropped`.
            bad: what happens where a file is damaged or missing, or a checksum does not match: "fail",
                or "drop" these examples, which makes batches smaller, or even empty, and count and name
                them in `report()`. The pointers' own footers have to be there: without them nothing is
                known that could be counted.
            workers: "threads" read in this process; "processes" are new interpreters, which decode
                without sharing this one's lock, and hand units over in shared memory. They start with
                the first pass and end with `close`, or with the loader.
            num_workers: threads or processes that read and decode; 0 reads in the thread that forms
                batches.
            prefetch: batches ready ahead; 0 forms them when they are asked for.
            pin_memory: page-lock batches, for transfers to a GPU; no effect without one.
            device: where batches go, without waiting for the transfer; None leaves them here.
            examples_per_unit, events_per_unit: what is read at once, at most (or one user). Units that
                are whole buckets of a history decode nothing twice.
            events_per_pool: of the units shuffled with each other, at most (or one unit).
            cache: a local folder that keeps decoded units, so that later epochs and other runs over
                the same snapshots need not decode them again; see docs/loading.md.
            cache_bytes: of that folder, at most.
            histories: where the groups' tables lie now, if they were moved since pinning.
            storage_options: as deltalake takes them.

        Raises:
            SchemaError: an option or a projection does not fit.
            TableError, PinError: what is pinned is gone or has changed.
            GoneError: events that were pointed at are gone, and `gone` is "fail".
        """
        super().__init__()
        if lanes is None:
            lanes = 1 if order == "stored" else 8
        self._options = OrderOptions(
            batch_size=batch_size,
            max_tokens=max_tokens,
            balance=balance,
            balance_length=balance_length,
            uneven=uneven,
            seed=seed,
            order=order,
            mix=mix,
            lanes=lanes,
            examples_per_unit=examples_per_unit,
            events_per_unit=events_per_unit,
            events_per_pool=events_per_pool,
        )
        _check_data(pointers, projections, histories)
        check_choice("workers", workers, ("threads", "processes"))
        check_int("cache_bytes", cache_bytes, 0)
        check_int("num_workers", num_workers, 0)
        check_int("prefetch", prefetch, 0)
        check_choice("form", form, get_args(Form))
        check_choice("verify", verify, get_args(Verify))
        check_choice("gone", gone, ("fail", "drop"))
        check_choice("bad", bad, ("fail", "drop"))
        self._rank, self._world_size = _ranks(rank, world_size)
        self._arguments: dict[str, Any] = {
            "projections": dict(projections),
            **self._options.to_json(),
            "form": form,
            "rank": self._rank,
            "world_size": self._world_size,
            "verify": verify,
            "gone": gone,
            "bad": bad,
            "workers": workers,
            "num_workers": num_workers,
            "prefetch": prefetch,
            "pin_memory": pin_memory,
            "device": device,
            "cache": cache,
            "cache_bytes": cache_bytes,
            "histories": histories,
            "storage_options": storage_options,
        }
        self._form: Form = form
        self._verify: Verify = verify
        self._bad: Literal["fail", "drop"] = bad
        self._num_workers = num_workers
        self._prefetch = prefetch
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._device = _device(device)
        self._process = os.getpid()

        self._pointers = (
            pointers.open(storage_options) if isinstance(pointers, PointerRef) else pointers
        )
        self._projections = dict(projections)
        self._histories = open_histories(
            self._pointers, list(self._projections), histories or {}, storage_options
        )
        self._traits = {
            group: _trait_schema(self._histories[group], projection)
            for group, projection in self._projections.items()
        }
        names = [*_EXAMPLE_KEYS, *(trait.name for trait in self._pointers.spec.columns)]
        self._columns = pa.schema([self._pointers.spec.schema.field(name) for name in names])
        self._plan = make_plan(
            self._pointers,
            self._histories,
            self._projections,
            examples_per_unit=examples_per_unit,
            events_per_unit=events_per_unit,
            verify=verify != "off",
            drop_gone=gone == "drop",
            by_window=order == "time",
        )
        self._lengths = Lengths(
            self._plan,
            self._pointers,
            self._histories,
            self._projections,
            verify=verify != "off",
            options=self._options,
            drop_bad=bad == "drop",
        )
        self._epochs = Epochs(self._plan, self._options, self._lengths)
        self._facts = self._find_facts()
        self._workers: Literal["threads", "processes"] = workers
        self._cache = cache
        self._cache_bytes = cache_bytes
        self._storage_options = storage_options
        self._source: UnitSource | None = None
        self._formed = ArenaBuffers()
        self._meter = Meter()
        self._setup = Setup(
            workers=workers,
            num_workers=num_workers,
            # One more than there are processes, so that none of them waits for something to do.
            num_readers=num_workers + (workers == "processes" and num_workers > 0),
            prefetch=prefetch,
            form=form,
            lanes=self._options.lanes,
            world_size=self._world_size,
            cached=cache is not None,
            verify=verify,
        )
        self._dropped = Dropped()
        self._bytes_before = 0  # by sources that were closed, less what was there at a reset
        self._is_cold = True
        self._last_share: Share | None = None
        self._move_to(Position(0, 0))

    def _open_source(self) -> UnitSource:
        whole = self._verify != "off"
        what = (self._pointers, self._histories, self._projections, self._columns.names)
        source: UnitSource
        if self._workers == "processes" and self._num_workers:
            spec = ReadSpec.of(*what, self._storage_options, whole=whole)
            source = ProcessSource(spec, self._num_workers)
        else:
            source = DirectSource(*what, ArenaBuffers(), whole=whole)
        if self._cache is not None:
            facts = CacheFacts.of(*what, whole=whole)
            source = CachedSource(source, self._cache, facts, max_bytes=self._cache_bytes)
        return source

    def close(self) -> None:
        """End the processes that read, if there are any, and let go of what they hold. The loader
        stays where it is, and can be gone on with."""
        if self._source is not None:
            self._bytes_before += self._source.bytes_read or 0
            self._source.close()
            self._source = None

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
        return self._share(self._epochs[self.epoch], 0).num_steps

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        check_int("epoch", epoch, 0)
        self._move_to(Position(epoch, 0))

    @property
    def epoch(self) -> int:
        """The epoch that is under way, or that the next pass goes over; grows by one with every pass."""
        return self._position.epoch

    def _move_to(self, position: Position) -> object:
        """Only the pass that has what this returns may move the loader from there."""
        self._position = position
        self._pass = object()
        return self._pass

    def _share(self, order: Epoch, begin: int, worker: int = 0, num_workers: int = 1) -> Share:
        return order.share(
            begin=begin,
            world_size=self._world_size,
            rank=self._rank,
            worker=worker,
            num_workers=num_workers,
        )

    # -- iterating ------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the present epoch; the whole of it unless resumed within."""
        if os.getpid() != self._process:
            raise LoaderError(
                "this loader was made in another process and came here by fork, which storage clients do "
                "not survive",
                'Start workers with multiprocessing_context="spawn", or make the loader in them.',
            )
        worker, num_workers = worker_of_process()
        if is_worker() and self._last_share is not None and self._position.num_batches:
            raise LoaderError(
                "a pass was broken off, and the DataLoader's workers, which outlived it, stand at "
                "different places",
                "Make the DataLoader with persistent_workers=False, or go to the end of each epoch.",
            )
        mine = self._move_to(self._position)
        epoch, begin = self._position.epoch, self._position.num_batches
        order = self._epochs[epoch]
        share = self._last_share = self._share(order, begin, worker, num_workers)
        if self._source is None:
            self._source = self._open_source()
        reader = EpochReader(
            self._plan,
            order.pools,
            self._source,
            self._options,
            epoch,
            verify=self._verify,
            bad=self._bad,
            dropped=self._dropped,
            lengths=self._lengths,
            slots=Slots(order.schedule) if self._options.balance else None,
        )
        lanes = self._options.lanes
        lanes_here = lanes // math.gcd(lanes, self._world_size * num_workers)
        stop = graph.Stop()
        batches = graph.run(
            graph.epoch_graph(
                share,
                reader,
                BatchFormer(self._form, self._columns, self._traits, self._formed, self._dropped),
                num_readers=self._setup.num_readers,
                num_formers=0,
                ahead=lanes_here + self._num_workers,
                prefetch=self._prefetch,
                pin_memory=self._pin_memory,
                device=self._device,
                stop=stop,
                meter=self._meter,
            ),
            stop,
        )
        self._note_uneven(share)
        try:
            for number in range(share.num_steps):
                asked = time.perf_counter()
                batch = next(batches)
                if self._pass is not mine:
                    raise LoaderError(
                        f"epoch {epoch} is not under way any more: another pass has begun, or the "
                        f"loader was set to another place",
                        "Go over a loader once at a time; make another one for a second reader.",
                    )
                self._count(batch, time.perf_counter() - asked)
                # A worker's state is its own: from it, the same worker takes its next step.
                done = begin + (number + 1) * num_workers * self._world_size
                self._position = Position(epoch, min(done, order.schedule.num_batches))
                given, used = time.perf_counter(), time.process_time()
                yield batch
                del batch  # its memory is free for the next one
                self._meter.stepped(time.perf_counter() - given, time.process_time() - used)
        finally:
            # Dropping the graph stops its threads, also after an early break.
            del batches
        if self._pass is mine:
            self._move_to(Position(epoch + 1, 0))
        if _LOG.isEnabledFor(logging.INFO):
            _LOG.info("epoch %d: %s", epoch, self._meter.report(self._setup)["sentence"])

    def _count(self, batch: Batch, waited: float) -> None:
        first, self._is_cold = self._is_cold, False
        sequences = batch.sequences.values()
        self._meter.handed_out(
            waited=waited,
            first=first,
            num_examples=batch.batch_size - batch.num_padding,
            events=sum(sequence.num_events for sequence in sequences),
            values=sum(sequence.num_values for sequence in sequences),
            size=batch.num_bytes,
        )

    def _note_uneven(self, share: Share) -> None:
        if share.num_left_out and not share.num_steps:
            _LOG.warning(
                "uneven='drop': there are fewer batches than ranks, so all %d examples are left out",
                share.num_left_out,
            )
        elif share.num_extra or share.num_left_out:
            what = (
                f"{share.num_left_out:,} examples are left out"
                if share.num_left_out
                else f"{share.num_extra:,} examples are added"
            )
            _LOG.info("uneven=%r: %s at the end of the epoch", self._options.uneven, what)

    def report(self) -> dict[str, Any]:
        """The stall report since the loader was made, or since `reset_report`.

        Keys: num_batches, num_examples, seconds, examples_per_second; first_batch_seconds;
        starved_seconds and starved_share (of the trainer's time, without the very first batch);
        data_ready_ms (p50, p95, p99, max of what the trainer waited for a batch); stages (read and form:
        busy_seconds, busy_share of their threads' time, waited_for_seconds); worker_waste (share of
        the readers' time without work); cpu_share (of the cores, while the trainer computed);
        bytes_read (as stored), bytes_out (of batches); dedupe_factor; dropped (num_examples, reasons);
        uneven (policy, num_left_out, num_extra of all ranks, at the end of the pass under way or the
        last one); sentence, in plain words.
        """
        found = self._meter.report(self._setup)
        found["bytes_read"] = self._bytes_read()
        found["dropped"] = self._dropped.to_json()
        share = self._last_share
        found["uneven"] = {
            "policy": self._options.uneven,
            "num_left_out": 0 if share is None else share.num_left_out,
            "num_extra": 0 if share is None else share.num_extra,
        }
        return found

    def reset_report(self) -> None:
        """Begin the stall report anew."""
        self._meter.reset()
        self._dropped.reset()
        self._bytes_before -= self._bytes_read() or 0

    def _bytes_read(self) -> int | None:
        now = 0 if self._source is None else self._source.bytes_read
        return None if now is None else now + self._bytes_before

    # -- stopping and going on ------------------------------------------------------------------

    def _find_facts(self) -> LoaderFacts:
        ref = self._pointers.ref()
        return LoaderFacts(
            pointers={
                "table_id": ref.table_id,
                "windows": list(ref.windows),
                "digest": ref.digest,
            },
            histories={
                group: {"table_id": snapshot.ref().table_id, "digest": snapshot.digest}
                for group, snapshot in self._histories.items()
            },
            projections={g: p.to_json() for g, p in sorted(self._projections.items())},
            num_examples=self.num_examples,
            options=self._options,
        )

    def state_dict(self) -> dict[str, Any]:
        """Where this loader stands: after the last batch that it handed out, whatever was prefetched.
        Ranks that took the same number of steps have equal states. In a worker of a DataLoader it is
        the state of that worker, which is what `StatefulDataLoader` keeps and gives back."""
        return self._facts.state(self._position)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another loader of the same data and order stood, on any number of ranks.

        Raises:
            PinError: the state was made on other data, with other options, or by another release.
        """
        position = self._facts.position(state)
        done = position.num_batches
        if done and done > self._epochs[position.epoch].schedule.num_batches:
            raise self._facts.damaged(f"{done} batches done, more than there are")
        self._move_to(position)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "pointers": self._pointers.ref(),
            "arguments": self._arguments,
            "state": self.state_dict(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        SequenceLoader.__init__(self, state["pointers"], **state["arguments"])
        self.load_state_dict(state["state"])


def _check_data(
    pointers: object, projections: Mapping[str, Projection], histories: Mapping[str, str] | None
) -> None:
    if not isinstance(pointers, (PointerRef, PointerSnapshot)):
        raise SchemaError(
            f"pointers is a {type(pointers).__name__}",
            "Give a pin: `dataset.ref()` names all windows, `dataset.ref([...])` some, "
            "PointerRef.from_json(...) reads one.",
        )
    for group, projection in projections.items():
        if not isinstance(projection, Projection):
            raise SchemaError(
                f"the projection of {group!r} is a {type(projection).__name__}",
                "Give a Projection(traits, max_length).",
            )
    for group in histories or {}:
        if group not in projections:
            raise SchemaError(
                f"histories names {group!r}, which is not read",
                f"The groups read are {', '.join(sorted(projections))}.",
            )


def _device(device: torch.device | str | None) -> torch.device | None:
    if device is None:
        return None
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise SchemaError(
            f"device={device!r} is unknown ({error})", "Use 'cpu' or 'cuda'."
        ) from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise SchemaError(f"device={device!r}, but there is no CUDA device", "Use 'cpu', or None.")
    return found


def _ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise SchemaError(
            f"rank={rank!r} with world_size={world_size!r}", "Give both of them, or neither."
        )
    if rank is None or world_size is None:
        rank, world_size = rank_of_process()
    check_int("world_size", world_size, 1)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < world_size:
        raise SchemaError(
            f"rank={rank!r} with world_size={world_size}", "Ranks go from 0 to world_size - 1."
        )
    return rank, world_size


def _trait_schema(snapshot: Snapshot, projection: Projection) -> pa.Schema:
    schema = snapshot.group.event_schema
    return pa.schema([schema.field(name) for name in tensor_columns(snapshot, projection)])
