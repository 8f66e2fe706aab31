"""Other writers' housekeeping does not take what is pinned; and where it was let to, that is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from deltalake import DeltaTable
from retention import at_version, compacted, content, data_files, named_by, pointers_on
from strategies import day, event_table

from vlm_dagster import HistoryStore
from vlm_dagster.commands.versions import describe_versions
from vlm_dagster.errors import TableError
from vlm_dagster.retention.protection import PROTECTION, missing_protection


@pytest.fixture
def store(tmp_path: Path) -> HistoryStore:
    return compacted(tmp_path / "history")


def housekeeping(uri: str) -> None:
    """All that Delta offers."""
    table = DeltaTable(uri)
    table.create_checkpoint()
    table.cleanup_metadata()
    table.vacuum(dry_run=False)
    table.vacuum(dry_run=False, full=True)


def test_logs_and_files_of_pinned_versions_outlive_it(store: HistoryStore, tmp_path: Path) -> None:
    dataset = pointers_on(store, tmp_path / "p", [2, 5])
    store.pin("mine", 12)
    refs = dataset.ref().pins
    versions = [12, *(pin.version for pin in refs)]
    before = {version: at_version(store, version) for version in versions}
    housekeeping(store.uri)
    housekeeping(dataset.uri)
    assert {version: at_version(store, version) for version in versions} == before
    assert [pin.open().version for pin in refs] == [pin.version for pin in refs]
    store.gc(keep_hours=0, dry_run=False)
    housekeeping(store.uri)
    assert {version: at_version(store, version) for version in versions} == before
    assert HistoryStore.open(store.uri).snapshot().verify(deep=True).ok
    assert data_files(store.uri) == named_by(store.uri, [*versions, store.snapshot().version])


def test_a_new_table_is_protected(store: HistoryStore) -> None:
    assert missing_protection(store.sealed_table) == {}
    assert DeltaTable(store.uri).metadata().configuration.items() >= PROTECTION.items()


def switch_off(uri: str) -> None:
    DeltaTable(uri).alter.set_table_properties(
        {
            "delta.enableExpiredLogCleanup": "true",
            "delta.logRetentionDuration": "interval 0 days",
        }
    )


def test_protection_that_was_switched_off_is_said_and_set_again(store: HistoryStore) -> None:
    switch_off(store.uri)
    found = store.gc()
    assert found.unprotected == {
        "delta.enableExpiredLogCleanup": "true",
        "delta.logRetentionDuration": "interval 0 days",
    }
    (warning,) = describe_versions(store)["warnings"]
    assert "delta.enableExpiredLogCleanup is 'true'" in warning
    assert f"vlm-dagster gc {store.uri} --delete" in warning
    table_id, spec = store.table_id, store.sealed_table.spec
    store.gc(dry_run=False)
    again = HistoryStore.open(store.uri)
    assert (again.table_id, again.sealed_table.spec) == (table_id, spec)
    assert missing_protection(again.sealed_table) == {}
    assert describe_versions(again)["warnings"] == []
    again.seal(day(8), event_table([], again.group))
    assert again.snapshot().verify(deep=True).ok


def test_what_was_cleaned_away_meanwhile_is_not_guessed_about(store: HistoryStore) -> None:
    """The files stay: the log may be restored. A pin whose content the newest has moves there."""
    store.pin("old", 3)
    before, files = at_version(store, 3), data_files(store.uri)
    switch_off(store.uri)
    DeltaTable(store.uri).create_checkpoint()
    DeltaTable(store.uri).cleanup_metadata()
    with pytest.raises(TableError, match="version 3"):
        at_version(store, 3)
    store = HistoryStore.open(store.uri)
    report = store.gc(keep_hours=0, dry_run=False)
    assert [hold.holder for hold in report.holding.moved] == ["old"]
    assert data_files(store.uri) < files
    assert content(HistoryStore.open(store.uri).pinned_as("old")) == before
