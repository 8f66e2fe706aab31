"""The commands that keep versions and let them go, as a user meets them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from retention import at_version, compacted, pointers_on
from strategies import files_below
from test_cli import refused, told

from vlm_dagster import HistoryStore, PointerDataset


@pytest.fixture
def store(tmp_path: Path) -> HistoryStore:
    return compacted(tmp_path / "history")


@pytest.fixture
def dataset(store: HistoryStore, tmp_path: Path) -> PointerDataset:
    return pointers_on(store, tmp_path / "pointers", [2])


def test_gc_says_what_holds_what_and_deletes_when_told(
    store: HistoryStore, dataset: PointerDataset
) -> None:
    told("pin", store.uri, "live", "--version", "12", "--reason", "what went live")
    before = files_below(store.uri), at_version(store, 12)
    text = told("gc", store.uri, "--keep-hours", "0")
    assert "pin live (what went live)" in text
    assert "pointer dataset" in text
    assert "the newest" in text
    assert "would retire 12 versions and free" in text.splitlines()[-1]
    assert text.rstrip().endswith("run with --delete")
    assert files_below(store.uri) == before[0]
    facts = json.loads(told("gc", store.uri, "--keep-hours", "0", "--json"))
    assert [kept["version"] for kept in facts["kept"]][1:] == [12, 3]
    text = told("gc", store.uri, "--keep-hours", "0", "--delete")
    assert text.splitlines()[-1] == (
        f"retired 12 versions, freed {facts['num_bytes']:,} bytes in {facts['num_files']} files"
    )
    assert set(facts["files"]) == before[0] - files_below(store.uri)
    assert at_version(store, 12) == before[1]
    text = told("gc", store.uri, "--keep-hours", "0", "--move-pins", "--verify", "--delete")
    assert "2 references open version" in text
    told("unpin", store.uri, "live")
    assert "no pin 'live'" in refused("unpin", store.uri, "live")
    assert "retired by gc" in refused("pin", store.uri, "late", "--version", "2")
    assert "freed 0 bytes" in told("gc", dataset.uri, "--keep-hours", "0", "--delete")


def test_inspect_shows_versions_and_what_pins_them(
    store: HistoryStore, dataset: PointerDataset
) -> None:
    store.pin("live", 12)
    text = told("inspect", store.uri)
    assert "compaction 1997-09-20..1997-09-27" in text
    assert "pin live" in text
    assert "only here" in text
    assert "░" in text
    assert "that nothing holds" in text
    store.gc(keep_hours=0, dry_run=False)
    assert "retired (last by gc" in told("inspect", store.uri)
    facts = json.loads(told("inspect", store.uri, "--json"))["versions"]
    assert {row["version"]: [hold["as"] for hold in row["holds"]] for row in facts["rows"]}[12] == [
        "pin live"
    ]
    shutil.rmtree(dataset.uri)
    assert "may refer to anything" in " ".join(told("inspect", store.uri).split())
    Path(store.uri, "_pins", "live.json").write_text("{")
    assert "is no pin" in told("inspect", store.uri)


def test_referrers_are_entered_by_hand(
    store: HistoryStore, dataset: PointerDataset, tmp_path: Path
) -> None:
    assert "was already entered" in told("refer", store.uri, dataset.uri)
    moved = shutil.move(dataset.uri, tmp_path / "moved")
    assert "is entered" in told("refer", store.uri, str(moved))
    assert "would retire 12" in told("gc", store.uri, "--keep-hours", "0")
    (tmp_path / "runs").mkdir()
    assert "checkpoint" in told("refer", store.uri, str(tmp_path / "runs"))
    assert "would retire 0" in told("gc", store.uri, "--keep-hours", "0")
    text = told("gc", store.uri, "--keep-hours", "0", "--forget", str(tmp_path / "runs"))
    assert "would retire 12" in text
    assert "nothing here" in refused("refer", store.uri, str(tmp_path / "nowhere"))
    assert "this is a history table" in refused("refer", store.uri, store.uri)
