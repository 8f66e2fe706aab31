"""The newest version is the newest one, however little of the log is read to know it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from hypothesis import given
from hypothesis import strategies as st
from strategies import day, few, history_of, many_events, seal_days

from vlm_dagster import HistoryStore
from vlm_dagster.errors import TableError
from vlm_dagster.sealed import opening, table

EVENTS = many_events(seed=3, num_events=60, num_users=9)
ACTIONS = ("seal", "compact", "checkpoint", "read", "read the other", "files", "cleanup")


@few(15)
@given(st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=12))
def test_two_stores_of_one_table_see_what_the_log_says(actions: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mine = history_of(f"{folder}/h", EVENTS, days=[0, 1])
        other = HistoryStore.open(mine.uri)
        sealed = 2
        for action in actions:
            if action == "seal":
                seal_days(other, EVENTS, [sealed])
                sealed += 1
            elif action == "compact":
                other.compact(fanout=2)
            elif action == "checkpoint":
                DeltaTable(mine.uri).create_checkpoint()
            elif action == "cleanup":
                drop_commits_before_the_checkpoint(mine.uri)
            else:
                store = other if action == "read the other" else mine
                handle = DeltaTable(mine.uri)
                snapshot = store.snapshot()
                assert snapshot.version == handle.version()
                assert len(snapshot.windows) == sealed
                if action == "files":
                    live = pa.table(handle.get_add_actions())["path"].to_pylist()
                    assert sorted(snapshot.files()["path"].to_pylist()) == sorted(live)


def drop_commits_before_the_checkpoint(uri: str) -> None:
    """What another tool's log cleanup leaves."""
    log = Path(uri, "_delta_log")
    checkpoints = sorted(log.glob("*.checkpoint.parquet"))
    for commit in log.glob("*.json"):
        if checkpoints and commit.name[:20] < checkpoints[-1].name[:20]:
            commit.unlink()


def test_a_table_that_was_made_anew_in_the_same_place_is_not_taken_for_it(tmp_path: Path) -> None:
    store = history_of(tmp_path / "h", EVENTS, days=[0])
    assert store.snapshot().version == 1
    shutil.rmtree(tmp_path / "h")
    history_of(tmp_path / "h", EVENTS[:30], days=[0])
    with pytest.raises(TableError, match="another table lies here now"):
        store.snapshot()
    shutil.rmtree(tmp_path / "h")
    with pytest.raises(TableError, match="no Delta table"):
        store.snapshot()


def test_opening_and_reading_loads_the_log_once(tmp_path: Path) -> None:
    uri = history_of(tmp_path / "h", EVENTS).uri
    opened = mock.Mock(side_effect=opening.open_delta)
    with (
        mock.patch.object(opening, "open_delta", opened),
        mock.patch.object(table, "open_delta", opened),
    ):
        store = HistoryStore.open(uri)
        for _ in range(3):
            assert store.snapshot().read([EVENTS[0]["user_id"]]).num_events
        assert opened.call_count == 1
        seal_days(HistoryStore.open(uri), EVENTS, [4])
        opened.reset_mock()
        assert store.snapshot().windows[-1].window.key == day(4)
        assert store.snapshot().files().num_rows
        assert opened.call_count == 0  # only what was committed since is read
