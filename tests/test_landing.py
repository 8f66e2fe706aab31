"""A landing splits a source by window: whole or not at all, in order, in bounded memory."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_dagster.errors import SourceFormatError, StorageError, TableError, WindowError
from vlm_dagster.events import (
    BinaryLabel,
    Landing,
    Progress,
    input_schema,
    land,
    landing,
    open_source,
)
from vlm_dagster.schema import TIME_TYPE, FeatureGroup, Trait
from vlm_dagster.windows import WindowGrid

HOUR_US = 3_600_000_000
START_US = 1_700_000_000_000_000 // HOUR_US * HOUR_US


@dataclass
class Listed:
    """A source that holds its events, and gives them in batches of a chosen size."""

    times_us: list[int | None]
    batch_rows: int = 1_000
    availability: Literal["recorded", "event_time"] = "event_time"
    name: str = "listed"
    breaks_after: int | None = None
    label: BinaryLabel | None = field(default_factory=lambda: BinaryLabel("item_id", 3))
    paths: tuple[str, ...] = ()
    num_dropped: int = 0

    @property
    def group(self) -> FeatureGroup:
        return FeatureGroup(
            "clicks", [Trait("item_id", pa.int64())], availability=self.availability
        )

    @property
    def num_bytes(self) -> int:
        return len(self.times_us)

    def options(self) -> dict[str, Any]:
        return {"name": self.name}

    def table(self) -> pa.Table:
        count = len(self.times_us)
        times = pa.array(self.times_us, pa.int64()).cast(TIME_TYPE)
        columns = [pa.array(range(count)), pa.array(range(count)), times, pa.array(range(count))]
        if self.availability == "recorded":
            columns[2] = pa.array([0] * count, TIME_TYPE)
            columns.insert(3, times)
        return pa.table(columns, schema=input_schema(self.group))

    def batches(self, progress: Progress | None = None) -> Iterator[pa.RecordBatch]:
        done = 0
        for batch in self.table().to_batches(self.batch_rows):
            if self.breaks_after is not None and done >= self.breaks_after:
                raise SourceFormatError(
                    "listed", "broke", line=done, value=None, way_out="Mend it."
                )
            yield batch
            done += batch.num_rows
            if progress is not None:
                progress(done)


def contents(landing: Landing) -> dict[str, pa.Table]:
    return {
        window.key: pa.concat_tables(pq.read_table(path) for path in landing.events(window))
        for window in landing.windows
        if landing.events(window)
    }


@given(
    hours=st.lists(st.integers(0, 24 * 30), min_size=1, max_size=200),
    within=st.integers(0, HOUR_US - 1),
    cadence=st.sampled_from(["hourly", "daily", "weekly"]),
    batch_rows=st.sampled_from([1, 7, 1000]),
    buffered=st.sampled_from([1, 500, 1 << 30]),
    availability=st.sampled_from(["recorded", "event_time"]),
)
def test_each_window_holds_its_events_in_the_sources_order(
    tmp_path_factory: pytest.TempPathFactory, hours: list[int], within: int, cadence: Any,
    batch_rows: int, buffered: int, availability: Any,
) -> None:  # fmt: skip
    times = [START_US + hour * HOUR_US + within for hour in hours]
    source = Listed(list(times), batch_rows, availability)
    grid = WindowGrid(cadence)
    folder = tmp_path_factory.mktemp("land") / "landing"
    landed = land(source, folder, grid, max_buffered_bytes=buffered)

    expected: dict[str, list[int]] = {}
    for row, at in enumerate(times):
        expected.setdefault(grid.containing(at).key, []).append(row)
    found = {key: table["item_id"].to_pylist() for key, table in contents(landed).items()}
    assert found == expected
    assert [w.key for w in landed.windows] == [
        w.key for w in grid.between(min(times), max(times) + 1)
    ]
    assert landed.num_events == len(times)
    assert (landed.first_us, landed.last_us) == (min(times), max(times))
    assert landed.problems() == []
    assert all(table.schema == input_schema(source.group) for table in contents(landed).values())
    # Neither the size of batches nor spilling shows in what is written.
    again = land(Listed(list(times), 1000, availability), folder.with_name("again"), grid)
    assert again.landed == landed.landed
    assert again.digest == landed.digest
    shutil.rmtree(folder.parent)


def test_a_window_without_events_is_listed_and_empty(tmp_path: Path) -> None:
    landed = land(Listed([START_US, START_US + 3 * HOUR_US]), tmp_path / "l", WindowGrid("hourly"))
    assert [len(landed.events(w)) for w in landed.windows] == [1, 0, 0, 1]
    assert [landed.num_events_in(w) for w in landed.windows] == [1, 0, 0, 1]
    with pytest.raises(WindowError, match="not a hourly key"):
        landed.events("2023-11-14")


def test_what_was_landed_can_be_opened_again(tmp_path: Path) -> None:
    landed = land(Listed([START_US]), tmp_path / "l", WindowGrid("daily"))
    opened = Landing.open(tmp_path / "l")
    assert opened == landed
    assert opened.label == BinaryLabel("item_id", 3)
    assert not opened.reused


def test_a_source_without_events_lands_without_windows(tmp_path: Path) -> None:
    landed = land(Listed([]), tmp_path / "l", WindowGrid("daily"))
    assert (landed.windows, landed.num_events, landed.first_us) == ([], 0, None)
    assert Landing.open(tmp_path / "l") == landed


def test_large_windows_are_written_in_row_groups_of_one_size(tmp_path: Path) -> None:
    source = Listed([START_US + n for n in range(300_000)], batch_rows=70_001)
    landed = land(source, tmp_path / "l", WindowGrid("daily"), max_buffered_bytes=1 << 20)
    metadata = pq.read_metadata(landed.events(landed.windows[0])[0])
    sizes = [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
    assert sizes == [131_072, 131_072, 37_856]
    rows = contents(landed)[landed.windows[0].key]["item_id"].to_pylist()
    assert rows == list(range(300_000))


class TestReuse:
    def rows(self, path: Path, text: str) -> Path:
        path.write_text(text)
        return path

    def test_an_unchanged_source_is_not_read_again(self, tmp_path: Path) -> None:
        path = self.rows(tmp_path / "u.data", "1\t2\t3\t881250949\n")
        first = land(open_source(path, "movielens"), tmp_path / "l", WindowGrid("daily"))
        stamp = (tmp_path / "l" / "landing.json").stat().st_mtime_ns
        second = land(open_source(path, "movielens"), tmp_path / "l", WindowGrid("daily"))
        assert (first.reused, second.reused) == (False, True)
        assert second.digest == first.digest
        assert (tmp_path / "l" / "landing.json").stat().st_mtime_ns == stamp

    def test_a_changed_source_option_or_window_is_landed_again(self, tmp_path: Path) -> None:
        path = self.rows(tmp_path / "u.data", "1\t2\t3\t881250949\n")
        daily, hourly = WindowGrid("daily"), WindowGrid("hourly")
        first = land(open_source(path, "movielens"), tmp_path / "l", daily)
        assert not land(open_source(path, "movielens"), tmp_path / "l", hourly).reused
        other = open_source(path, "movielens", on_cut_line="drop")
        assert not land(other, tmp_path / "l", hourly).reused
        self.rows(path, "1\t2\t3\t881250949\n1\t3\t3\t881250949\n")
        changed = land(open_source(path, "movielens"), tmp_path / "l", daily)
        assert not changed.reused
        assert changed.digest != first.digest
        assert sorted(p.name for p in tmp_path.iterdir()) == ["l", "u.data"]

    def test_a_landing_that_lost_a_file_is_made_again(self, tmp_path: Path) -> None:
        source = Listed([START_US])
        landed = land(source, tmp_path / "l", WindowGrid("daily"))
        Path(landed.events(landed.windows[0])[0]).unlink()
        with pytest.raises(TableError, match=r"windows/2023-11-14.parquet is missing"):
            Landing.open(tmp_path / "l")
        assert not land(source, tmp_path / "l", WindowGrid("daily")).reused
        assert Landing.open(tmp_path / "l").problems() == []

    def test_a_source_that_changes_while_it_is_read_is_refused(self, tmp_path: Path) -> None:
        path = self.rows(tmp_path / "u.data", "1\t2\t3\t881250949\n")

        def touch(_: int) -> None:
            path.touch()

        with pytest.raises(SourceFormatError, match="changed while it was read"):
            land(open_source(path, "movielens"), tmp_path / "l", WindowGrid("daily"), touch)
        assert not (tmp_path / "l").exists()


class TestRefusals:
    def test_a_folder_of_something_else_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("precious")
        with pytest.raises(TableError, match="is not a landing"):
            land(Listed([START_US]), tmp_path, WindowGrid("daily"))
        with pytest.raises(TableError, match="is not a landing"):
            Landing.open(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]

    def test_what_is_missing_or_a_file_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(TableError, match="there is no landing here"):
            Landing.open(tmp_path / "gone")
        (tmp_path / "file").write_text("")
        with pytest.raises(TableError, match="is a file, not a landing"):
            Landing.open(tmp_path / "file")

    def test_a_manifest_cut_off_or_newer_is_refused(self, tmp_path: Path) -> None:
        land(Listed([START_US]), tmp_path / "l", WindowGrid("daily"))
        manifest = tmp_path / "l" / "landing.json"
        text = manifest.read_text()
        manifest.write_text(text[: len(text) // 2])
        with pytest.raises(TableError, match="was cut off"):
            Landing.open(tmp_path / "l")
        manifest.write_text(json.dumps({**json.loads(text), "version": 2}))
        with pytest.raises(TableError, match="another release"):
            Landing.open(tmp_path / "l")

    def test_changed_bytes_are_found(self, tmp_path: Path) -> None:
        landed = land(Listed([START_US]), tmp_path / "l", WindowGrid("daily"))
        path = Path(landed.events(landed.windows[0])[0])
        raw = bytearray(path.read_bytes())
        raw[40] ^= 1
        path.write_bytes(raw)
        assert landed.problems() == [
            "windows/2023-11-14.parquet: its bytes changed since it was landed"
        ]

    def test_an_event_without_time_belongs_nowhere(self, tmp_path: Path) -> None:
        source = Listed([START_US, START_US, None], batch_rows=2)
        with pytest.raises(SourceFormatError, match=r"event 2 \(from 0\) has no event_time"):
            land(source, tmp_path / "l", WindowGrid("daily"))
        assert list(tmp_path.iterdir()) == []


class TestNothingHalfWritten:
    def test_a_source_that_breaks_leaves_nothing(self, tmp_path: Path) -> None:
        source = Listed([START_US + n * HOUR_US for n in range(100)], 10, breaks_after=50)
        with pytest.raises(SourceFormatError, match="broke"):
            land(source, tmp_path / "l", WindowGrid("hourly"), max_buffered_bytes=1)
        assert list(tmp_path.iterdir()) == []

    def test_a_source_that_breaks_keeps_the_landing_before(self, tmp_path: Path) -> None:
        before = land(Listed([START_US]), tmp_path / "l", WindowGrid("hourly"))
        with pytest.raises(SourceFormatError, match="broke"):
            land(
                Listed([START_US], name="other", breaks_after=0),
                tmp_path / "l",
                WindowGrid("hourly"),
            )
        assert Landing.open(tmp_path / "l") == before

    def test_a_full_disk_is_said_and_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(landing, "write_window", full)
        with pytest.raises(StorageError, match="No space left on device"):
            land(Listed([START_US]), tmp_path / "l", WindowGrid("hourly"))
        assert list(tmp_path.iterdir()) == []

    def test_a_killed_process_shows_nothing_and_is_swept(self, tmp_path: Path) -> None:
        code = (
            "import sys, time; sys.path.insert(0, sys.argv[1])\n"
            "from test_landing import *\n"
            "def wait(done):\n"
            "    print('reading', flush=True); time.sleep(60)\n"
            "land(Listed([START_US] * 10, 2), sys.argv[2], WindowGrid('daily'), wait)\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "l")],
            stdout=subprocess.PIPE,
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"reading\n"
            process.send_signal(signal.SIGKILL)
        assert not (tmp_path / "l").exists()
        assert len(list(tmp_path.iterdir())) == 1
        land(Listed([START_US]), tmp_path / "l", WindowGrid("daily"))
        assert [p.name for p in tmp_path.iterdir()] == ["l"]

    def test_processes_that_land_the_same_at_once_all_succeed(self, tmp_path: Path) -> None:
        with ProcessPoolExecutor(4, multiprocessing.get_context("spawn")) as pool:
            digests = set(pool.map(_land, [tmp_path / "l"] * 8))
        assert len(digests) == 1
        assert [p.name for p in tmp_path.iterdir()] == ["l"]
        assert Landing.open(tmp_path / "l").problems() == []


def _land(folder: Path) -> str:
    time.sleep(0.05)  # let all workers start
    times: list[int | None] = [START_US + n * HOUR_US for n in range(50)]
    return land(Listed(times), folder, WindowGrid("daily")).digest


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    seen: list[int] = []
    source = Listed([START_US] * 10, batch_rows=3)
    land(source, tmp_path / "l", WindowGrid("daily"), seen.append)
    assert seen == [3, 6, 9, 10]


def test_nulls_count_in_the_digest_and_are_kept_for_the_store(tmp_path: Path) -> None:
    def landed(name: str, *items: int | None) -> Landing:
        times = pa.array([START_US] * len(items), TIME_TYPE)
        pq.write_table(
            pa.table({"user_id": range(len(items)), "event_id": range(len(items)),
                      "event_time": times, "item_id": pa.array(items, pa.int64())}),
            tmp_path / f"{name}.parquet",
        )  # fmt: skip
        source = open_source(tmp_path / f"{name}.parquet", "parquet")
        return land(source, tmp_path / name, WindowGrid("daily"))

    with_null, with_zero = landed("a", 1, None, 3), landed("b", 1, 0, 3)
    assert with_null.digest != with_zero.digest
    assert contents(with_null)["2023-11-14"]["item_id"].to_pylist() == [1, None, 3]


@pytest.mark.realdata
def test_globo_lands_by_day_with_its_late_clicks(real_data: Path, tmp_path: Path) -> None:
    source = open_source(real_data / "globo-news" / "clicks", "globo")
    landed = land(source, tmp_path / "l", WindowGrid("daily"))
    assert landed.num_events == 2_988_181
    assert [landed.windows[0].key, landed.windows[-1].key] == ["2017-10-01", "2017-11-13"]
    assert sum(landed.num_events_in(w) for w in landed.windows) == 2_988_181
    assert len(landed.windows) == 44
    assert landed.digest == "vlm1-2988181-5810f5352a12e3cb0e51591b388f66c2"
