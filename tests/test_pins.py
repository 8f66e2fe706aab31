"""Named pins: kept whatever else happens, one version a name, and safe against a collection at the same
instant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from retention import at_version, compacted, content, pointers_on
from strategies import files_below

from vlm_dagster import HistoryStore, PointerDataset
from vlm_dagster.errors import PinError, RetiredVersionError, SchemaError, TableError
from vlm_dagster.retention import collect
from vlm_dagster.sealed.table import SealedTable


@pytest.fixture
def store(tmp_path: Path) -> HistoryStore:
    return compacted(tmp_path / "history")


def test_a_pin_names_a_version_until_it_is_let_go(store: HistoryStore) -> None:
    made = store.pin("release-1.0", 3, reason="what went live")
    newest = store.pin("newest")
    assert newest.version == store.snapshot().version - 1
    other = HistoryStore.open(store.uri)
    assert other.pins_by_name() == {"release-1.0": made, "newest": newest}
    assert content(other.pinned_as("release-1.0")) == at_version(store, 3)
    assert (made.reason, made.digest) == ("what went live", store.snapshot(3).digest)
    assert other.unpin("release-1.0") == made
    assert set(store.pins_by_name()) == {"newest"}


def test_pointer_datasets_are_pinned_too(store: HistoryStore, tmp_path: Path) -> None:
    dataset = pointers_on(store, tmp_path / "p", [1, 2])
    made = dataset.pin("two-days")
    pointers_on(store, tmp_path / "p", [3])
    found = PointerDataset.open(dataset.uri).pinned_as("two-days")
    assert found.version == made.version
    assert [sealed.window.key for sealed in found.windows] == ["1997-09-21", "1997-09-22"]


def test_pinning_the_same_again_changes_nothing(store: HistoryStore) -> None:
    first = store.pin("a", 3, reason="first")
    before = files_below(store.uri)
    assert store.pin("a", 3, reason="second") == first
    assert files_below(store.uri) == before


def test_a_name_is_not_moved_to_another_version(store: HistoryStore) -> None:
    store.pin("a", 3)
    with pytest.raises(PinError, match=r"version 3.*version 4.*unpin .* a`"):
        store.pin("a", 4)
    assert store.find_pin("a").version == 3


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "ä", "x" * 101, "a\n"])
def test_names_that_are_no_file_names_are_refused(store: HistoryStore, name: str) -> None:
    before = files_below(store.uri)
    for call in (store.pin, store.unpin, store.pinned_as):
        with pytest.raises(SchemaError, match="pin name"):
            call(name)
    assert files_below(store.uri) == before


def test_what_is_not_there_is_said(store: HistoryStore) -> None:
    store.pin("one", 3)
    with pytest.raises(PinError, match=r"names: one.*no pin 'two'"):
        store.unpin("two")
    with pytest.raises(TableError, match="version 99"):
        store.pin("late", 99)
    assert set(store.pins_by_name()) == {"one"}


def test_a_retired_version_cannot_be_pinned(store: HistoryStore) -> None:
    newest = store.snapshot().version
    store.gc(keep_hours=0, dry_run=False)
    with pytest.raises(RetiredVersionError, match=r"retired by gc.*inspect") as caught:
        store.pin("late", 3)
    assert caught.value.version == 3
    assert not store.pins_by_name()
    assert store.pin("good", newest).version == newest


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 1, "name": "a"}'])
def test_a_damaged_pin_stops_everything(store: HistoryStore, text: str) -> None:
    """It may hold any version."""
    store.pin("a", 3)
    path = Path(store.uri, "_pins", "a.json")
    good = path.read_text()
    path.write_text(text)
    before = files_below(store.uri)
    with pytest.raises(TableError, match=r"_pins/a\.json is no pin"):
        store.gc(keep_hours=0, dry_run=False)
    path.write_text(json.dumps({**json.loads(good), "format": 2}))
    with pytest.raises(TableError, match="newer than this code"):
        store.gc(keep_hours=0, dry_run=False)
    assert files_below(store.uri) == before


def test_a_pin_made_while_it_is_decided_what_to_keep_is_kept(
    store: HistoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collection looks again: it must not retire what was pinned since it looked."""
    before = at_version(store, 3)
    decided = collect.find_holding
    calls = []

    def slow(*args: object, **options: object) -> object:
        found = decided(*args, **options)
        if not calls:
            HistoryStore.open(store.uri).pin("late", 3)
        calls.append(1)
        return found

    monkeypatch.setattr(collect, "find_holding", slow)
    report = store.gc(keep_hours=0, dry_run=False)
    assert len(calls) == 2
    assert 3 in [kept.version for kept in report.holding.kept]
    assert at_version(store, 3) == before


def test_a_collection_that_commits_first_refuses_the_pin(
    store: HistoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pin has seen the log before the retirement, and commits after it."""
    open_now, pinning = SealedTable.handle, HistoryStore.open(store.uri)
    handles = [pinning.sealed_table.handle()]
    newest = store.snapshot().version

    def stale(self: SealedTable, version: int | None = None) -> object:
        if self is pinning.sealed_table and version is None and handles:
            return handles.pop()
        return open_now(self, version)

    ref = store.ref(3)
    monkeypatch.setattr(HistoryStore, "_ref", lambda self, version: ref)
    monkeypatch.setattr(SealedTable, "handle", stale)
    store.gc(keep_hours=0, dry_run=False)
    with pytest.raises(RetiredVersionError):
        pinning.pin("late", 3)
    assert not store.pins_by_name()
    assert store.snapshot().version == newest + 1
