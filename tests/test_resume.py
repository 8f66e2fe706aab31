"""A loader goes on exactly: at every batch, on other ranks and workers, and only where it belongs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from loading import ORDERS, PROJECTION, Content, content, contents, ids, loader_of, pointers_in
from strategies import day

from vlm_dagster import PointerDataset, Projection, SequenceLoader
from vlm_dagster.errors import PinError

WORLDS = (1, 2, 3, 4, 8)


@pytest.fixture(scope="module")
def pointers(tmp_path_factory: pytest.TempPathFactory) -> PointerDataset:
    return pointers_in(tmp_path_factory.mktemp("tables"))


def through_json(state: Mapping[str, Any]) -> Any:
    """As a checkpoint would keep it."""
    return json.loads(json.dumps(state))


def resumed(loader: SequenceLoader, state: Mapping[str, Any]) -> list[Content]:
    """The rest of an epoch from a state on."""
    loader.load_state_dict(state)
    return contents(loader)


def in_turn(ranks: list[list[Content]]) -> list[Content]:
    """The batches of all ranks, step by step."""
    return [b for step in zip_longest(*ranks) for b in step if b is not None]


@pytest.mark.parametrize("name", ORDERS)
def test_at_every_batch_of_two_epochs_it_gives_the_batches_that_would_have_come(
    pointers: PointerDataset, name: str
) -> None:
    stopping = loader_of(pointers, **ORDERS[name])
    epochs: list[list[Content]] = []
    states: list[list[Any]] = []
    for _ in range(2):
        epochs.append([])
        states.append([through_json(stopping.state_dict())])
        for batch in stopping:
            epochs[-1].append(content(batch))
            states[-1].append(through_json(stopping.state_dict()))
    assert epochs[0] != epochs[1] or ORDERS[name].get("order") == "stored"
    # The end of an epoch is the beginning of the next one.
    assert stopping.state_dict() == {**states[1][0], "epoch": 2}
    again = loader_of(pointers, **ORDERS[name])
    for number, whole in enumerate(epochs):
        assert len(states[number]) == len(whole) + 1 > 10
        for done, state in enumerate(states[number]):
            assert resumed(again, state) == whole[done:]
            assert again.epoch == number + 1
    # And from one epoch into the next.
    assert resumed(again, states[0][-2]) + contents(again) == [epochs[0][-1], *epochs[1]]


@pytest.mark.parametrize("workers", [{"num_workers": 1}, {"num_workers": 3, "prefetch": 4}])
def test_what_was_read_ahead_is_not_in_a_state(
    pointers: PointerDataset, workers: dict[str, int]
) -> None:
    whole = contents(loader_of(pointers))
    stopping = loader_of(pointers, **workers)
    again = loader_of(pointers, num_workers=2, prefetch=1)
    for done, _ in enumerate(stopping, 1):
        state = through_json(stopping.state_dict())
        if done % 4 == 0:
            assert resumed(again, state) == whole[done:]
    assert done == len(whole)


@pytest.mark.parametrize("name", ["shuffled", "by tokens"])
def test_on_any_other_number_of_ranks_it_goes_on(pointers: PointerDataset, name: str) -> None:
    whole = contents(loader_of(pointers, **ORDERS[name]))
    loaders = {
        world: [loader_of(pointers, rank=r, world_size=world, **ORDERS[name]) for r in range(world)]
        for world in WORLDS
    }
    states: dict[int, Any] = {}
    for ranks in loaders.values():
        begun = [iter(rank) for rank in ranks]
        for step in range(1, len(whole) // len(ranks) + 1):
            for rank in begun:
                next(rank)
            found = [through_json(rank.state_dict()) for rank in ranks]
            # Ranks that took the same number of steps have the same state, whoever saves it.
            assert all(state == found[0] for state in found)
            # And so have those of any other number that are as far.
            done = step * len(ranks)
            assert states.setdefault(done, found[0]) == found[0]
        del begun
    assert sorted(states) == list(range(1, len(whole) + 1))
    for done, state in states.items():
        for world in WORLDS if done in (1, 8) else (3,):
            rest = [resumed(rank, state) for rank in loaders[world]]
            assert in_turn(rest) == whole[done:]


@pytest.mark.parametrize("uneven", ["drop", "repeat", "pad"])
def test_on_other_ranks_the_uneven_end_is_worked_out_anew(
    pointers: PointerDataset, uneven: str
) -> None:
    whole = contents(loader_of(pointers))
    plain = loader_of(pointers, uneven=uneven)
    state = plain.state_dict()
    for world in (2, 3):
        ranks = [loader_of(pointers, rank=r, world_size=world, uneven=uneven) for r in range(world)]
        for done in range(0, len(whole), 3):
            rest = [resumed(rank, {**state, "num_batches": done}) for rank in ranks]
            assert len({len(rank) for rank in rest}) == 1
            num_full = len([batch for batch in whole[done:] if len(batch[0]) == 12])
            expected = (
                num_full // world if uneven == "drop" else -(-(len(whole) - done) // world)
            ) * world
            found = in_turn(rest)
            assert len(found) == expected
            same = min(num_full, expected)
            assert found[:same] == whole[done : done + same]
            assert {len(batch[0]) for batch in found} <= {12}
            if uneven == "pad":
                assert sorted(ids(found)) == sorted(ids(whole[done:]))
            if uneven == "repeat":
                assert set(ids(found)) >= set(ids(whole[done:]))


# -- states that do not belong here ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"seed": 8}, "loader state, seed: pinned 7, found 8"),
        ({"batch_size": 16}, "batch_size: pinned 12, found 16"),
        ({"order": "stored"}, "order: pinned shuffled, found stored"),
        ({"order": "time"}, "order: pinned shuffled, found time"),
        ({"mix": 0}, "mix: pinned 3, found 0"),
        ({"lanes": 2}, "lanes: pinned 4, found 2"),
        ({"max_tokens": 90}, "max_tokens: pinned None, found 90"),
        ({"balance": "tokens"}, "balance: pinned None, found tokens"),
        ({"uneven": "pad"}, "uneven: pinned keep, found pad"),
        ({"examples_per_unit": 13}, "examples_per_unit: pinned 12, found 13"),
        ({"events_per_pool": 99}, "events_per_pool: pinned 1000000, found 99"),
        ({"seed": 8, "mix": 0, "lanes": 2}, r"seed: .* \(2 more differences\)"),
    ],
)
def test_a_state_of_another_order_is_refused_by_name(
    pointers: PointerDataset, changed: dict[str, Any], told: str
) -> None:
    state = loader_of(pointers).state_dict()
    with pytest.raises(PinError, match=f"{told}.*make the loader as it was, or start anew"):
        loader_of(pointers, **changed).load_state_dict(state)


def test_neither_form_nor_workers_nor_policies_make_another_order(
    pointers: PointerDataset,
) -> None:
    loader = loader_of(pointers)
    next(iter(loader))
    others = {
        "form": "views", "num_workers": 2, "prefetch": 3, "verify": "off", "bad": "drop",
        "gone": "drop",
    }  # fmt: skip
    other = loader_of(pointers, **others)
    other.load_state_dict(loader.state_dict())
    assert other.state_dict() == loader.state_dict()


def test_a_state_of_other_data_is_refused_by_name(pointers: PointerDataset, tmp_path: Path) -> None:
    state = loader_of(pointers).state_dict()
    options = {"batch_size": 12, "examples_per_unit": 12, "mix": 3, "lanes": 4, "seed": 7}
    way_out = "make the loader as it was, or start anew"
    shorter = SequenceLoader(pointers.ref(), {"ratings": Projection(["event_id"], 3)}, **options)
    with pytest.raises(PinError, match=f"projection 'ratings'.*20.*3.*{way_out}"):
        shorter.load_state_dict(state)
    fewer = SequenceLoader(pointers.ref([day(0)]), PROJECTION, **options)
    with pytest.raises(PinError, match=f"windows of the pointers.*more differences.*{way_out}"):
        fewer.load_state_dict(state)
    with pytest.raises(PinError, match=f"table_id of the pointers.*{way_out}"):
        loader_of(pointers_in(tmp_path)).load_state_dict(state)
    for key in ("table_id", "digest"):
        other = through_json(state)
        other["histories"]["ratings"][key] = "another"
        with pytest.raises(PinError, match=f"history 'ratings'.*another.*{way_out}"):
            loader_of(pointers).load_state_dict(other)
    with pytest.raises(PinError, match=f"number of examples: pinned 3, found .*{way_out}"):
        loader_of(pointers).load_state_dict({**state, "num_examples": 3})


@pytest.mark.parametrize("version", [1, 3, None, "2"])
def test_a_state_of_another_release_is_refused(pointers: PointerDataset, version: object) -> None:
    loader = loader_of(pointers)
    with pytest.raises(PinError, match="another release: use that one, or start the epoch anew"):
        loader.load_state_dict({**loader.state_dict(), "version": version})


DAMAGED = "It is damaged: take another one, or start the epoch anew"


@pytest.mark.parametrize("value", [None, "x", 3, [], {"ratings": None}])
@pytest.mark.parametrize("key", ["pointers", "histories", "projections", "options"])
def test_a_state_with_a_damaged_part_is_refused(
    pointers: PointerDataset, key: str, value: object
) -> None:
    loader = loader_of(pointers)
    state = {**loader.state_dict(), "epoch": 1}
    with pytest.raises(PinError, match=f"{DAMAGED}|make the loader as it was, or start anew"):
        loader.load_state_dict({**state, key: value})
    del state[key]
    with pytest.raises(PinError, match=DAMAGED):
        loader.load_state_dict(state)
    assert loader.epoch == 0


@pytest.mark.parametrize("value", [None, "1", 1.0, True, -1, [1]])
@pytest.mark.parametrize("key", ["epoch", "num_batches"])
def test_a_count_that_is_none_is_refused(pointers: PointerDataset, key: str, value: object) -> None:
    loader = loader_of(pointers)
    before = loader.state_dict()
    with pytest.raises(PinError, match=f"{key}.*{DAMAGED}"):
        loader.load_state_dict({**before, key: value})
    assert loader.state_dict() == before


def test_more_batches_than_there_are_are_refused(pointers: PointerDataset) -> None:
    loader = loader_of(pointers)
    before = loader.state_dict()
    with pytest.raises(PinError, match=f"99 batches done, more than there are.*{DAMAGED}"):
        loader.load_state_dict({**before, "epoch": 3, "num_batches": 99})
    assert loader.state_dict() == before


@pytest.mark.parametrize("state", [None, [], "state", 7])
def test_what_is_no_state_at_all_is_refused(pointers: PointerDataset, state: Any) -> None:
    with pytest.raises(PinError, match=DAMAGED):
        loader_of(pointers).load_state_dict(state)
    with pytest.raises(PinError, match="another release"):
        loader_of(pointers).load_state_dict({})
