"""What a loader does about damage, forgery and events that are gone: fail by name, or drop and count."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from loading import EVENTS, IDS, ORDERS, Content, content, contents, ids, loader_of, pointers_in
from reference import bucket, checksum, fat_rows
from strategies import day
from test_dropping import drop

from vlm_dagster import Batch, HistoryStore, PointerDataset, SequenceLoader
from vlm_dagster.errors import ChecksumError, CorruptFileError, GoneError
from vlm_dagster.loaders.materialize import UnitData
from vlm_dagster.loaders.plan import Unit
from vlm_dagster.loaders.sources import DirectSource
from vlm_dagster.pointers import spans


def in_bucket(number: int) -> list[tuple[int, int]]:
    """The examples of a bucket's users."""
    return [(user, request) for user, request in IDS if bucket(user, 3) == number]


def without(batches: Sequence[Content], lost: set[tuple[int, int]]) -> list[Content]:
    """The same batches, smaller by what is lost."""
    found = []
    for users, requests, lengths, events, num_padding in batches:
        keep = [pair not in lost for pair in zip(users, requests, strict=True)]
        bounds = np.cumsum([0, *lengths])
        kept_events = [
            events[a:b] for a, b, ok in zip(bounds, bounds[1:], keep, strict=False) if ok
        ]
        found.append(
            (
                tuple(u for u, ok in zip(users, keep, strict=True) if ok),
                tuple(r for r, ok in zip(requests, keep, strict=True) if ok),
                tuple(n for n, ok in zip(lengths, keep, strict=True) if ok),
                tuple(event for part in kept_events for event in part),
                num_padding,
            )
        )
    return found


# -- damaged and missing files --------------------------------------------------------------------


def history_file(folder: Path) -> Path:
    """Of the first day, with the users of one bucket."""
    (found,) = (folder / "history" / f"segment={day(0)}" / "bucket=1").glob("*.parquet")
    return found


def removed(path: Path) -> str:
    path.unlink()
    return "is missing"


def flipped(path: Path) -> str:
    """Every page is damaged, and the footer is not."""
    content = bytearray(path.read_bytes())
    end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    content[4:end] = bytes(byte ^ 0xFF for byte in content[4:end])
    path.write_bytes(bytes(content))
    return path.name


@pytest.mark.parametrize("harm", [removed, flipped])
def test_damage_fails_by_name_unless_told_otherwise(tmp_path: Path, harm: Any) -> None:
    pointers = pointers_in(tmp_path)
    path = history_file(tmp_path)
    told = harm(path)
    with pytest.raises(CorruptFileError, match=told) as raised:
        contents(loader_of(pointers))
    assert raised.value.path.endswith(path.name)


@pytest.mark.parametrize("harm", [removed, flipped])
def test_damage_can_be_dropped_counted_and_named(tmp_path: Path, harm: Any) -> None:
    pointers = pointers_in(tmp_path)
    whole = contents(loader_of(pointers))
    path = history_file(tmp_path)
    told = harm(path)
    loader = loader_of(pointers, bad="drop", num_workers=2)
    found = contents(loader)
    lost = set(IDS) - set(ids(found))
    assert lost == set(in_bucket(1))
    assert found == without(whole, lost)
    dropped = loader.report()["dropped"]
    assert dropped["num_examples"] == len(lost)
    assert len(dropped["reasons"]) == 1
    assert told in dropped["reasons"][0]
    assert path.name in dropped["reasons"][0]
    # What is read again in the next epoch is counted once.
    contents(loader)
    again = loader.report()["dropped"]
    assert again == {**dropped, "num_examples": 2 * len(lost)}
    json.dumps(loader.report())


@pytest.mark.parametrize("name", ORDERS)
def test_what_is_dropped_changes_nothing_else_in_any_order(tmp_path: Path, name: str) -> None:
    pointers = pointers_in(tmp_path)
    options = {**ORDERS[name], "uneven": "keep"}
    whole = contents(loader_of(pointers, **options))
    removed(history_file(tmp_path))
    loader = loader_of(pointers, bad="drop", **options)
    found, states = [], [loader.state_dict()]
    for batch in loader:
        found.append(content(batch))
        states.append(loader.state_dict())
    assert found == without(whole, set(in_bucket(1)))
    # On other ranks, and from any batch on, it is the same.
    again = loader_of(pointers, bad="drop", **options)
    for done, state in enumerate(states):
        again.load_state_dict(state)
        assert contents(again) == found[done:]
    ranks = [loader_of(pointers, bad="drop", rank=r, world_size=2, **options) for r in range(2)]
    assert [contents(rank) for rank in ranks] == [found[::2], found[1::2]]


@pytest.mark.parametrize("name", ["shuffled", "by tokens", "by time"])
def test_damaged_pointers_are_dropped_too(tmp_path: Path, name: str) -> None:
    pointers = pointers_in(tmp_path)
    (path,) = (tmp_path / "pointers" / f"segment={day(1)}" / "bucket=2").glob("*.parquet")
    flipped(path)
    with pytest.raises(CorruptFileError, match=path.name):
        contents(loader_of(pointers, **ORDERS[name]))
    loader = loader_of(pointers, bad="drop", **ORDERS[name])
    found = ids(contents(loader))
    assert len(set(found)) == len(found)
    lost = set(IDS) - set(found)
    assert lost
    assert lost <= set(in_bucket(2))
    dropped = loader.report()["dropped"]
    assert dropped["num_examples"] == len(lost)
    assert path.name in dropped["reasons"][0]


def test_a_batch_of_which_nothing_is_left_is_empty(tmp_path: Path) -> None:
    pointers = pointers_in(tmp_path)
    loader = loader_of(pointers, bad="drop", order="stored", batch_size=5)
    num_batches = len(loader)
    removed(history_file(tmp_path))
    batches: list[Batch] = list(loader)
    assert len(batches) == num_batches
    assert min(batch.batch_size for batch in batches) == 0
    empty = next(batch for batch in batches if not batch.batch_size)
    assert empty.sequences["ratings"].values["event_id"].shape == (0,)
    assert content(empty) == ((), (), (), (), 0)


# -- checksums ------------------------------------------------------------------------------------


def forged_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[PointerDataset, set]:
    """Pointers of which a third have other checksums than their sequences; and which these are."""
    right = spans.Span.checksums

    def wrong(span: Any) -> Any:
        sums = right(span)
        return sums + (sums % 3 == 0)

    with monkeypatch.context() as patch:
        patch.setattr(spans.Span, "checksums", wrong)
        pointers = pointers_in(folder)
    sums = {
        (row["user_id"], row["event_id"]): checksum([e["event_id"] for e in row["sequence"]], 0)
        for row in fat_rows(EVENTS, EVENTS)
        if row["sequence"]
    }
    return pointers, {pair for pair, found in sums.items() if found % 3 == 0}


def test_a_checksum_that_does_not_match_fails_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pointers, forged = forged_in(tmp_path, monkeypatch)
    with pytest.raises(ChecksumError, match="does not match the pointer's checksum") as raised:
        contents(loader_of(pointers))
    assert raised.value.user_id in {user for user, _ in forged}
    # Whoever does not look sees nothing.
    assert sorted(ids(contents(loader_of(pointers, verify="off")))) == IDS


def test_examples_whose_checksums_do_not_match_can_be_dropped_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pointers, forged = forged_in(tmp_path, monkeypatch)
    assert 0 < len(forged) < len(IDS) / 2
    whole = contents(loader_of(pointers, verify="off"))
    loader = loader_of(pointers, bad="drop", num_workers=2)
    found = contents(loader)
    assert set(IDS) - set(ids(found)) == forged
    assert [sorted(ids([b])) for b in found] == [sorted(ids([b])) for b in without(whole, forged)]
    assert found == without(whole, forged)
    dropped = loader.report()["dropped"]
    assert dropped["num_examples"] == len(forged)
    assert "does not match the pointer's checksum" in dropped["reasons"][0]


# -- verifying a sample ---------------------------------------------------------------------------


class Recording(DirectSource):
    """Remembers which units were verified."""

    verified: list[tuple[Unit, bool]]

    def read(self, unit: Unit, user_ids: pa.Array, *, verify: bool) -> UnitData:
        self.verified.append((unit, verify))
        return super().read(unit, user_ids, verify=verify)


def verified_units(loader: SequenceLoader, num_epochs: int) -> list[set[Unit]]:
    """Which units each epoch verifies."""
    what = (loader._pointers, loader._histories, loader._projections, loader._columns.names)
    source = Recording(*what)
    loader._source = source
    found = []
    for _ in range(num_epochs):
        source.verified = []
        for _ in loader:
            pass
        assert len(source.verified) == len(loader._plan.units)
        found.append({unit for unit, verify in source.verified if verify})
    return found


def test_a_sample_of_units_is_verified_another_one_in_every_epoch(tmp_path: Path) -> None:
    pointers = pointers_in(tmp_path)
    options = {"examples_per_unit": 1, "batch_size": 64}  # a unit a user
    sampled = verified_units(loader_of(pointers, verify="sampled", **options), 50)
    num_units = len(loader_of(pointers, **options)._plan.units)
    share = sum(len(units) for units in sampled) / (50 * num_units)
    assert 0.5 / 16 < share < 2 / 16
    assert len(set(map(frozenset, sampled))) > 20
    # In the long run, all of them.
    assert len(set().union(*sampled)) == num_units
    # The same ones again: what is verified is no accident.
    assert verified_units(loader_of(pointers, verify="sampled", **options), 5) == sampled[:5]
    (every,) = verified_units(loader_of(pointers, verify="always", **options), 1)
    (none,) = verified_units(loader_of(pointers, verify="off", **options), 1)
    assert (len(every), len(none)) == (num_units, 0)


# -- events that are gone -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shuffled", "users together", "by time", "by tokens"])
def test_examples_whose_events_are_gone_are_refused_or_dropped_and_counted(
    tmp_path: Path, name: str
) -> None:
    pointers = pointers_in(tmp_path)
    whole = contents(loader_of(pointers, **ORDERS[name]))
    drop(HistoryStore.open(tmp_path / "history"), 1)
    with pytest.raises(GoneError, match="gone='drop'"):
        loader_of(pointers, **ORDERS[name])
    loader = loader_of(pointers, gone="drop", **ORDERS[name])
    found = contents(loader)
    assert loader.num_examples + loader.num_dropped == len(IDS)
    assert 0 < loader.num_examples < len(IDS)
    assert len(ids(found)) == len(set(ids(found))) == loader.num_examples
    # Those that are left have the sequences that they had.
    before = {pair: seq for batch in whole for pair, seq in sequences(batch)}
    assert all(before[pair] == seq for batch in found for pair, seq in sequences(batch))
    # The rest goes on exactly.
    for done in range(0, len(found), 3):
        state = {**loader.state_dict(), "epoch": 0, "num_batches": done}
        again = loader_of(pointers, gone="drop", **ORDERS[name])
        again.load_state_dict(state)
        assert contents(again) == found[done:]


def sequences(batch: Content) -> list[tuple[tuple[int, int], tuple[int, ...]]]:
    users, requests, lengths, events, _ = batch
    bounds = np.cumsum([0, *lengths]).tolist()
    parts = [events[a:b] for a, b in pairwise(bounds)]
    return list(zip(zip(users, requests, strict=True), parts, strict=True))
