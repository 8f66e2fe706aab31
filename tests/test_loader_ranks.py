"""Sharing an epoch out: among ranks, and among the workers of a DataLoader."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import IDS, ORDERS, PROJECTION, Content, content, contents, ids, loader_of, pointers_in
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from vlm_dagster import PointerDataset, SequenceLoader
from vlm_dagster.errors import LoaderError, SchemaError

FEW = {"batch_size": 24}  # for what starts processes


@pytest.fixture(scope="module")
def pointers(tmp_path_factory: pytest.TempPathFactory) -> PointerDataset:
    return pointers_in(tmp_path_factory.mktemp("tables"))


@pytest.mark.parametrize("name", ["shuffled", "by time", "by tokens", "balanced tokens"])
@pytest.mark.parametrize("world", [2, 3, 8, 19])
def test_ranks_share_every_example_once_in_one_global_order(
    pointers: PointerDataset, name: str, world: int
) -> None:
    whole = contents(loader_of(pointers, **ORDERS[name]))
    assert sorted(ids(whole)) == IDS
    loaders = [loader_of(pointers, rank=r, world_size=world, **ORDERS[name]) for r in range(world)]
    ranks = [contents(loader) for loader in loaders]
    assert list(chain(*zip_longest(*ranks)))[: len(whole)] == whole
    assert sum(len(rank) for rank in ranks) == len(whole)
    for loader, rank in zip(loaders, ranks, strict=True):
        assert len(loader) == len(rank)


def test_the_order_of_an_epoch_is_this(pointers: PointerDataset) -> None:
    # Golden: the requests that open the first batches. States that are kept anywhere name batches
    # of this order, so it may change only together with the version of loader states.
    found = {
        name: [batch[1][:4] for batch in contents(loader_of(pointers, **ORDERS[name]))[:3]]
        for name in GOLDEN
    }
    assert found == GOLDEN


GOLDEN: dict[str, list[tuple[int, ...]]] = {
    "shuffled": [(89, 154, 121, 66), (29, 5, 102, 82), (166, 83, 161, 11)],
    "users together": [(79, 89, 154, 70), (109, 76, 121, 51), (37, 120, 74, 67)],
    "stored": [(82, 8, 95, 3), (91, 64, 42, 22), (92, 56, 44, 75)],
    "by time": [(6, 123, 82, 8), (37, 120, 15, 148), (140, 98, 156, 54)],
    "by tokens": [(89, 154, 121, 66), (5, 102, 82, 3), (166, 83, 161, 11)],
    "balanced tokens": [(89, 70, 94, 109), (6, 28, 102, 129), (114, 83, 33, 122)],
}


# -- who this process is --------------------------------------------------------------------------


def test_ranks_are_those_that_torchrun_names(
    pointers: PointerDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(loader_of(pointers, rank=1, world_size=3))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert contents(loader_of(pointers)) == expected
    assert contents(loader_of(pointers, rank=0, world_size=1)) != expected


@pytest.mark.parametrize(
    ("rank", "size"), [("3", "3"), ("-1", "2"), ("", "2"), ("one", "2"), ("0", "0")]
)
def test_ranks_that_cannot_be_are_refused(
    pointers: PointerDataset, monkeypatch: pytest.MonkeyPatch, rank: str, size: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(SchemaError, match=f"RANK='{rank}'.*WORLD_SIZE='{size}'.*torchrun"):
        loader_of(pointers)
    # What is passed goes before what the environment says.
    assert len(loader_of(pointers, rank=0, world_size=1)) > 1


def run_rank(rank: int, size: int, folder: str, rendezvous: str) -> None:
    """One rank of a distributed run, in a process of its own."""
    os.environ.pop("RANK", None)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size
    )
    loader = loader_of(PointerDataset.open(f"{folder}/pointers"), **FEW)
    Path(f"{rendezvous}-{rank}.json").write_text(json.dumps(contents(loader)))
    torch.distributed.destroy_process_group()


def test_ranks_are_those_of_torch_distributed(pointers: PointerDataset, tmp_path: Path) -> None:
    folder = str(Path(pointers.uri).parent)
    spawn = multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=run_rank, args=(rank, 2, folder, str(tmp_path / "meet")))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=100)
        assert process.exitcode == 0
    for rank in range(2):
        found = json.loads((tmp_path / f"meet-{rank}.json").read_text())
        expected = contents(loader_of(pointers, rank=rank, world_size=2, **FEW))
        assert found == json.loads(json.dumps(expected))


# -- workers of a DataLoader ----------------------------------------------------------------------


def data_loader(loader: SequenceLoader, num_workers: int, **options: Any) -> DataLoader:
    context = "spawn" if num_workers else None
    return DataLoader(
        loader, batch_size=None, num_workers=num_workers, multiprocessing_context=context, **options
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_loader_gives_the_same_batches_in_the_same_order(
    pointers: PointerDataset, num_workers: int
) -> None:
    plain, loader = (loader_of(pointers, rank=1, world_size=2) for _ in range(2))
    given = data_loader(loader, num_workers, persistent_workers=num_workers > 0)
    assert len(given) == len(plain)
    for _ in range(2):  # persistent workers go on from epoch to epoch by themselves
        assert [content(batch) for batch in given] == contents(plain)


def test_workers_start_where_the_loader_stands(pointers: PointerDataset) -> None:
    loader = loader_of(pointers, **FEW)
    loader.set_epoch(3)
    whole = contents(loader)
    loader.set_epoch(3)
    for _ in zip(range(3), loader, strict=False):
        pass
    state = loader.state_dict()
    twin = pickle.loads(pickle.dumps(loader))
    assert twin.state_dict() == state
    assert [content(batch) for batch in data_loader(twin, 2)] == whole[state["num_batches"] :]


def stateful(pointers: PointerDataset, num_workers: int) -> StatefulDataLoader:
    return StatefulDataLoader(
        loader_of(pointers, rank=0, world_size=2, batch_size=8),
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context="spawn" if num_workers else None,
    )


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata's own
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stateful_data_loader_goes_on_within_an_epoch(
    pointers: PointerDataset, num_workers: int
) -> None:
    expected = contents(loader_of(pointers, rank=0, world_size=2, batch_size=8))
    assert len(expected) > 10
    # At odds with the workers' turns, where there are any.
    stops = (5,) if num_workers else range(len(expected) + 1)
    begun = stateful(pointers, num_workers)
    states: dict[int, Any] = {}
    found: list[Content] = []
    for done, batch in enumerate(begun, 1):
        found.append(content(batch))
        if done in stops:
            states[done] = pickle.loads(pickle.dumps(begun.state_dict()))
    assert found == expected
    for done, state in states.items():
        fresh = stateful(pointers, num_workers)
        fresh.load_state_dict(state)
        assert [content(batch) for batch in fresh] == expected[done:]


def iterate_in_fork(loader: SequenceLoader, pipe: Any) -> None:
    try:
        next(iter(loader))
    except LoaderError as error:
        pipe.send(str(error))
    else:
        pipe.send("it went on")


def test_a_loader_that_came_by_fork_says_so_and_does_not_hang(pointers: PointerDataset) -> None:
    loader = loader_of(pointers, num_workers=2, prefetch=2)
    next(iter(loader))
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=iterate_in_fork, args=(loader, there), daemon=True)
    process.start()
    assert here.poll(60)
    assert "came here by fork" in (told := here.recv())
    assert 'multiprocessing_context="spawn"' in told
    process.join(timeout=60)
    assert process.exitcode == 0
    forked = DataLoader(loader, batch_size=None, num_workers=1, multiprocessing_context="fork")
    # torch hands over the text of an error, in one of its own making.
    with pytest.raises(Exception, match=r"(?s)LoaderError.*came here by fork"):
        next(iter(forked))


# -- pickling -------------------------------------------------------------------------------------


def test_a_pickled_loader_keeps_all_it_was_told(pointers: PointerDataset) -> None:
    options = {
        "rank": 1, "world_size": 2, "max_tokens": 90, "form": "views", "order": "time",
        "uneven": "keep", "verify": "sampled", "bad": "drop", "gone": "drop", "num_workers": 1,
        "prefetch": 3, "storage_options": {"secret_access_key": "hush-hush"},
    }  # fmt: skip
    loader = SequenceLoader(pointers.ref(), PROJECTION, 9, **options)  # type: ignore[arg-type]
    twin = pickle.loads(pickle.dumps(loader))
    assert twin._arguments == loader._arguments
    assert twin.state_dict() == loader.state_dict()
    for shown in (repr(loader), str(twin), repr(loader.state_dict()), repr(loader.report())):
        assert "hush" not in shown
