"""Who refers to a table enters itself there; who cannot be found any more is never guessed about."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from retention import at_version, compacted, data_files, named_by, pointers_on, requests_of
from strategies import day, files_below

from vlm_dagster import HistoryStore, PointerDataset
from vlm_dagster.errors import StorageError, TableError
from vlm_dagster.retention import Referrer, register
from vlm_dagster.retention.references import CHECKPOINT
from vlm_dagster.retention.referrers import read_referrers
from vlm_dagster.storage import LocalStorage
from vlm_dagster.training.checkpoint import MANIFEST


@pytest.fixture
def store(tmp_path: Path) -> HistoryStore:
    return compacted(tmp_path / "history")


@pytest.fixture
def dataset(store: HistoryStore, tmp_path: Path) -> PointerDataset:
    return pointers_on(store, tmp_path / "pointers", [2, 5])


def entries(store: HistoryStore | PointerDataset) -> list[Referrer]:
    return read_referrers(store.sealed_table)


def kept(store: HistoryStore | PointerDataset, **options: object) -> list[int]:
    """The versions that a collection keeps besides the newest."""
    report = store.gc(keep_hours=0, dry_run=False, **options)
    return [one.version for one in report.holding.kept if one.version != report.holding.version]


# -- pointer datasets -----------------------------------------------------------------------------


def test_a_pointer_dataset_holds_what_its_windows_pin(
    store: HistoryStore, dataset: PointerDataset
) -> None:
    pinned = sorted(pin.version for pin in dataset.ref().pins)
    before = {version: at_version(store, version) for version in pinned}
    assert kept(store) == pinned[::-1]
    assert data_files(store.uri) == named_by(store.uri, [*pinned, store.snapshot().version])
    assert {version: at_version(store, version) for version in pinned} == before


def test_it_enters_itself_before_its_first_window_is_committed(
    store: HistoryStore, tmp_path: Path
) -> None:
    dataset = PointerDataset.create(tmp_path / "p", ["ratings"], num_buckets=2)
    staged = dataset.stage(day(2), requests_of(2), {"ratings": store.snapshot(3)})
    (entry,) = entries(store)
    assert (entry.kind, entry.uri, entry.table_id) == ("pointers", dataset.uri, dataset.table_id)
    dataset.commit(staged)
    dataset.seal(day(3), requests_of(3), {"ratings": store.snapshot(4)})
    pointers_on(store, tmp_path / "p", [2])
    assert entries(store) == [entry]


def test_entries_hold_no_credentials(store: HistoryStore, dataset: PointerDataset) -> None:
    uri = "s3://key:secret@bucket/p?token=hush"
    register(store.sealed_table, Referrer.pointers(uri, "id"))
    texts = [p.read_text() for p in Path(store.uri, "_referrers").iterdir()]
    assert len(texts) == 2
    assert not any("secret" in text or "hush" in text for text in texts)


def test_without_write_access_sealing_fails_unless_it_is_entered(
    store: HistoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_new = LocalStorage.put_new

    def read_only(self: LocalStorage, data: bytes, path: str) -> bool:
        if self.uri == store.uri:
            raise StorageError(self.uri, f"writing {path}", PermissionError(13, "denied"))
        return put_new(self, data, path)

    dataset = PointerDataset.create(tmp_path / "p", ["ratings"], num_buckets=2)
    work = (day(2), requests_of(2), {"ratings": store.snapshot(3)})
    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "put_new", read_only)
        with pytest.raises(TableError, match=r"cannot be entered.*vlm-dagster refer .*/p`"):
            dataset.seal(*work)
        assert not data_files(dataset.uri)
    register(store.sealed_table, Referrer.pointers(dataset.uri, dataset.table_id))
    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "put_new", read_only)
        assert dataset.seal(*work).version == 1


def test_a_dataset_that_vanished_holds_everything(
    store: HistoryStore, dataset: PointerDataset, tmp_path: Path
) -> None:
    shutil.move(dataset.uri, tmp_path / "elsewhere")
    before = files_below(store.uri)
    report = store.gc(keep_hours=0, move_pins=True, dry_run=False)
    assert [(v.referrer.uri, v.holds_all) for v in report.holding.vanished] == [(dataset.uri, True)]
    assert "no Delta table" in report.holding.vanished[0].problem
    assert files_below(store.uri) == before
    # Forgetting another one does not help, even with a pattern.
    assert store.gc(keep_hours=0, forget=["/x/*", "pointers"]).holding.num_to_retire == 0
    shutil.move(tmp_path / "elsewhere", dataset.uri)
    assert kept(store) == sorted((pin.version for pin in dataset.ref().pins), reverse=True)


def test_a_dataset_that_was_moved_is_found_where_it_is_entered_again(
    store: HistoryStore, dataset: PointerDataset, tmp_path: Path
) -> None:
    moved = PointerDataset.open(shutil.move(dataset.uri, tmp_path / "elsewhere"))
    assert store.gc(keep_hours=0).holding.num_to_retire == 0
    moved.seal(day(3), requests_of(3), {"ratings": store.snapshot(4)})
    assert len(entries(store)) == 2
    report = store.gc(keep_hours=0)
    assert not report.holding.vanished
    assert 4 in [one.version for one in report.holding.kept]


def test_another_dataset_at_its_place_is_not_it(
    store: HistoryStore, dataset: PointerDataset
) -> None:
    shutil.rmtree(dataset.uri)
    pointers_on(store, Path(dataset.uri), [6])
    report = store.gc(keep_hours=0)
    assert "another table" in report.holding.vanished[0].problem
    assert report.holding.num_to_retire == 0


def test_forgetting_lets_go_of_what_vanished_and_only_of_that(
    store: HistoryStore, dataset: PointerDataset, tmp_path: Path
) -> None:
    alive = pointers_on(store, tmp_path / "alive", [4])
    shutil.rmtree(dataset.uri)
    dry = store.gc(keep_hours=0, forget=[f"{tmp_path}/*"])
    assert [one.referrer.uri for one in dry.holding.references.forgotten] == [dataset.uri]
    assert len(entries(store)) == 2
    (pin,) = alive.ref().pins
    assert kept(store, forget=[f"{tmp_path}/*"]) == [pin.version]
    assert [entry.uri for entry in entries(store)] == [alive.uri]


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1, "kind": "pointers"}'])
def test_a_damaged_entry_stops_everything(
    store: HistoryStore, dataset: PointerDataset, text: str
) -> None:
    (path,) = Path(store.uri, "_referrers").iterdir()
    path.write_text(text)
    before = files_below(store.uri)
    with pytest.raises(TableError, match="is no entry of a referrer"):
        store.gc(keep_hours=0, dry_run=False)
    path.write_text(json.dumps({"format": 2, "kind": "x", "uri": "", "table_id": "", "pins": {}}))
    with pytest.raises(TableError, match="Upgrade"):
        store.gc(keep_hours=0, dry_run=False)
    assert files_below(store.uri) == before


# -- checkpoints ----------------------------------------------------------------------------------


def checkpoint(folder: Path, dataset: PointerDataset, *windows: str) -> Path:
    """A checkpoint's manifest, as far as anybody here reads it."""
    pins = {"train": dataset.ref(windows or None).to_json(), "eval": None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CHECKPOINT).write_text(json.dumps({"format_version": 1, "pins": pins}))
    return folder


def enter(folder: Path, *tables: HistoryStore | PointerDataset, pins: object = None) -> None:
    for table in tables:
        register(table.sealed_table, Referrer.checkpoint(str(folder), pins))


def pins_in(folder: Path) -> dict[str, object]:
    return {k: v for k, v in json.loads((folder / CHECKPOINT).read_text())["pins"].items() if v}


def test_the_name_of_a_manifest_is_the_same_everywhere() -> None:
    assert CHECKPOINT == MANIFEST


def test_a_checkpoint_holds_what_it_was_trained_on(
    store: HistoryStore, dataset: PointerDataset, tmp_path: Path
) -> None:
    """Also when the dataset that it came from is gone for good."""
    version = dataset.snapshot().version
    folder = checkpoint(tmp_path / "run", dataset)
    enter(folder, store, dataset, pins=pins_in(folder))
    dataset.seal(day(6), requests_of(6), {"ratings": store.snapshot(7)})
    assert kept(dataset) == [version]
    pinned = sorted((pin.version for pin in dataset.ref(version=version).pins), reverse=True)
    shutil.rmtree(dataset.uri)
    assert kept(store, forget=[dataset.uri]) == pinned


def test_a_checkpoint_that_vanished_holds_what_it_was_entered_with(
    store: HistoryStore, dataset: PointerDataset, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path / "run", dataset, day(2))
    enter(folder, store, pins=pins_in(folder))
    (pin,) = dataset.ref([day(2)]).pins
    shutil.rmtree(dataset.uri)
    shutil.rmtree(folder)
    report = store.gc(keep_hours=0, forget=[dataset.uri])
    assert [(v.referrer.uri, v.holds_all) for v in report.holding.vanished] == [
        (str(folder), False)
    ]
    assert kept(store, forget=[dataset.uri]) == [pin.version]
    assert kept(store, forget=[str(folder)]) == []
    assert entries(store) == []


def test_a_run_that_is_to_replace_a_checkpoint_is_held_too(
    store: HistoryStore, dataset: PointerDataset, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path / "run", dataset, day(5))
    new = {"train": dataset.ref([day(2)]).to_json()}
    enter(folder, store, pins=new)
    both = sorted((pin.version for pin in dataset.ref().pins), reverse=True)
    shutil.rmtree(dataset.uri)
    assert kept(store, forget=[dataset.uri]) == both
    # Long after, the manifest is what counts.
    for path in Path(store.uri, "_referrers").iterdir():
        os.utime(path, (0, 0))
    (old,) = (version for version in both if version != dataset_pin(new))
    assert kept(store) == [old]


def dataset_pin(pins: dict[str, dict]) -> int:
    ((pin,),) = [ref["pins"] for ref in pins.values()]
    return int(pin["version"])


def test_a_folder_of_checkpoints_stands_for_those_below(
    store: HistoryStore, dataset: PointerDataset, tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    enter(root, store)
    assert store.gc(keep_hours=0, forget=[dataset.uri]).holding.num_to_retire == 0
    folder = checkpoint(root / "ranker" / "a", dataset, day(2))
    assert register(store.sealed_table, Referrer.checkpoint(str(folder), pins_in(folder))) is False
    (pin,) = dataset.ref([day(2)]).pins
    shutil.rmtree(dataset.uri)
    assert kept(store, forget=[dataset.uri]) == [pin.version]


def test_a_manifest_that_cannot_be_read_is_as_good_as_none(
    store: HistoryStore, dataset: PointerDataset, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path / "run", dataset)
    enter(folder, store)
    (folder / CHECKPOINT).write_text("{")
    report = store.gc(keep_hours=0, dry_run=False)
    assert "cannot be read" in report.holding.vanished[0].problem
    assert report.holding.num_to_retire == 0
