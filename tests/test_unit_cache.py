"""The cache of decoded units: it never gives what would not have been read, whatever is in its folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from unit_sources import COLUMNS, PROJECTIONS, World, assert_same, opened, world_in

from vlm_dagster import HistoryStore, PointerDataset, Projection
from vlm_dagster.errors import ChecksumError, SchemaError, StorageError
from vlm_dagster.loaders import cache, cache_folder
from vlm_dagster.loaders.cache import CachedSource, clear_cache
from vlm_dagster.loaders.cache_facts import CacheFacts
from vlm_dagster.loaders.cache_folder import CacheFolder
from vlm_dagster.loaders.materialize import UnitData
from vlm_dagster.loaders.plan import Unit
from vlm_dagster.loaders.sources import UnitSource


class Counting:
    """A source that counts what is read of it, and notes what was to be verified."""

    def __init__(self, source: UnitSource) -> None:
        self.source = source
        self.verified: list[bool] = []
        self.closed = False

    def read(self, unit: Unit, user_ids: pa.Array, *, verify: bool) -> UnitData:
        self.verified.append(verify)
        return self.source.read(unit, user_ids, verify=verify)

    @property
    def bytes_read(self) -> int | None:
        return self.source.bytes_read

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world_in(tmp_path_factory.mktemp("tables"))


def facts_of(world: World, columns: Sequence[str] = COLUMNS) -> CacheFacts:
    return CacheFacts.of(world.pointers, world.histories, world.projections, columns)


def cached(world: World, folder: Path, max_bytes: int = 1 << 30) -> tuple[CachedSource, Counting]:
    behind = Counting(world.direct())
    return CachedSource(behind, folder, facts_of(world), max_bytes=max_bytes), behind


def epoch(source: UnitSource, world: World, *, verify: bool = True) -> list[UnitData]:
    return [source.read(u, world.plan.users_of(u), verify=verify) for u in world.plan.units]


def assert_right(units: list[UnitData], world: World) -> None:
    for found, wanted in zip(units, epoch(world.direct(), world), strict=True):
        assert_same(found, wanted)


def files_of(folder: Path, pattern: str = "*.unit") -> list[Path]:
    return sorted(folder.glob(f"*/{pattern}"))


def num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_of(folder))


def test_a_second_epoch_reads_nothing_and_gives_the_same(world: World, tmp_path: Path) -> None:
    source, behind = cached(world, tmp_path)
    assert_right(epoch(source, world), world)
    assert len(behind.verified) == len(world.plan.units) == source.num_written
    assert_right(epoch(source, world), world)
    again, untouched = cached(opened(Path(world.pointers.uri).parent), tmp_path)
    assert_right(epoch(again, world), world)
    assert again.bytes_read == 0
    assert len(behind.verified) == source.num_misses == source.num_hits == len(world.plan.units)
    assert untouched.verified == []
    again.close()
    assert untouched.closed


def test_units_stay_whole_while_their_memory_is_used_again(world: World, tmp_path: Path) -> None:
    source, _ = cached(world, tmp_path)
    epoch(source, world)
    kept = [epoch(source, world) for _ in range(3)]
    for units in kept:
        assert_right(units, world)


def test_what_was_kept_unverified_is_verified_when_asked_for(world: World, tmp_path: Path) -> None:
    source, behind = cached(world, tmp_path)
    number = len(world.plan.units)
    epoch(source, world, verify=False)
    epoch(source, world, verify=False)
    assert behind.verified == [False] * number
    epoch(source, world, verify=True)
    assert behind.verified == [False] * number + [True] * number
    epoch(source, world, verify=True)
    epoch(source, world, verify=False)
    assert len(behind.verified) == 2 * number
    assert len(files_of(tmp_path)) == number


@pytest.mark.parametrize(
    "projections",
    [
        {**PROJECTIONS, "views": Projection(["item_id"])},
        {**PROJECTIONS, "views": Projection(["available_at", "item_id"])},
        {**PROJECTIONS, "views": Projection(["item_id", "available_at"], max_length=20)},
        {"views": PROJECTIONS["views"], "ratings": PROJECTIONS["ratings"]},
        {"views": PROJECTIONS["views"]},
    ],
)
def test_another_projection_never_hits(
    world: World, tmp_path: Path, projections: dict[str, Projection]
) -> None:
    epoch(cached(world, tmp_path)[0], world)
    other = opened(Path(world.pointers.uri).parent, projections)
    source, behind = cached(other, tmp_path)
    assert_right(epoch(source, other), other)
    assert len(behind.verified) == len(other.plan.units)


def test_other_columns_windows_and_users_never_hit(world: World, tmp_path: Path) -> None:
    epoch(cached(world, tmp_path)[0], world)
    fewer = CachedSource(
        Counting(world.spec.open()), tmp_path, facts_of(world, COLUMNS[:3]), max_bytes=1 << 30
    )
    unit = world.plan.units[0]
    fewer.read(unit, world.plan.users_of(unit), verify=True)
    assert (fewer.num_hits, fewer.num_misses) == (0, 1)

    dataset = PointerDataset.open(world.pointers.uri)
    two = dataset.ref([window.window.key for window in world.pointers.windows[:2]]).open()
    facts = CacheFacts.of(two, world.histories, world.projections, COLUMNS)
    assert facts.digest != facts_of(world).digest

    source, _ = cached(world, tmp_path)
    users = world.plan.users_of(unit)
    source.read(unit, users.slice(1), verify=True)
    assert (source.num_hits, source.num_misses) == (0, 1)
    source.read(unit, pa.concat_arrays([users.slice(0, 1), users.slice(1)]), verify=True)
    assert source.num_hits == 1


def test_another_digest_never_hits_and_a_compaction_does_not_matter(tmp_path: Path) -> None:
    world = world_in(tmp_path / "tables", num_events=120, num_users=6)
    folder = tmp_path / "cache"
    epoch(cached(world, folder)[0], world)
    store = HistoryStore.open(world.histories["views"].uri)
    store.compact(fanout=2)
    compacted = opened(tmp_path / "tables")
    assert compacted.histories["views"].version > world.histories["views"].version
    source, behind = cached(compacted, folder)
    assert_right(epoch(source, compacted), compacted)
    assert behind.verified == []
    snapshot = store.snapshot()
    store.seal("1997-09-24", pa.table({n: pa.array([], t) for n, t in [
        ("user_id", pa.int64()), ("event_id", pa.int64()),
        ("event_time", pa.timestamp("us", "UTC")), ("available_at", pa.timestamp("us", "UTC")),
        ("item_id", pa.int64()), ("rating", pa.float32()), ("title", pa.string()),
        ("liked", pa.bool_()),
    ]}))  # fmt: skip
    assert store.snapshot().digest != snapshot.digest
    source, behind = cached(opened(tmp_path / "tables"), folder)
    epoch(source, compacted)
    assert source.num_hits == 0


def test_a_byte_that_is_flipped_anywhere_is_found_and_mended(world: World, tmp_path: Path) -> None:
    source, _ = cached(world, tmp_path)
    unit = max(world.plan.units, key=lambda one: one.num_events)
    users = world.plan.users_of(unit)
    wanted = source.read(unit, users, verify=True)
    (path,) = files_of(tmp_path)
    whole = path.read_bytes()
    places = [*range(64), *range(64, len(whole), max(len(whole) // 150, 1)), len(whole) - 1]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        assert_same(source.read(unit, users, verify=True), wanted)
        assert path.read_bytes() == whole
    assert source.num_damaged == len(places) == source.num_misses - 1


@pytest.mark.parametrize("kept", [0, 1, 63, 64, 1000, -8, -1])
def test_a_file_that_is_cut_or_too_long_is_found_and_mended(
    world: World, tmp_path: Path, kept: int
) -> None:
    source, _ = cached(world, tmp_path)
    unit = world.plan.units[0]
    users = world.plan.users_of(unit)
    wanted = source.read(unit, users, verify=True)
    (path,) = files_of(tmp_path)
    whole = path.read_bytes()
    for content in (whole[:kept], whole + bytes(8), bytes(len(whole)), b""):
        path.write_bytes(content)
        assert_same(source.read(unit, users, verify=True), wanted)
        assert path.read_bytes() == whole
    assert source.num_damaged == 4


def test_rows_of_the_checksum_that_change_places_are_found(world: World, tmp_path: Path) -> None:
    source, _ = cached(world, tmp_path)
    unit = max(world.plan.units, key=lambda one: one.num_events)
    source.read(unit, world.plan.users_of(unit), verify=True)
    (path,) = files_of(tmp_path)
    whole = path.read_bytes()
    body = whole[64:]
    assert len(body) > 3 * 4096
    swapped = body[4096:8192] + body[:4096] + body[8192:]
    words = body[8:16] + body[:8] + body[16:]
    shifted = bytes(8) + body[:-8]
    for content in (swapped, words, shifted):
        assert content != body
        path.write_bytes(whole[:64] + content)
        source.read(unit, world.plan.users_of(unit), verify=True)
    assert source.num_damaged == 3


def test_a_file_under_another_units_name_is_not_taken_for_it(world: World, tmp_path: Path) -> None:
    source, _ = cached(world, tmp_path)
    epoch(source, world)
    first, second = files_of(tmp_path)[:2]
    second.replace(first)
    assert_right(epoch(source, world), world)
    assert source.num_damaged == 1


FILL = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from test_unit_cache import cached, epoch
from unit_sources import opened

world = opened(Path({tables!r}))
print("ready", flush=True)
sys.stdin.readline()
source, behind = cached(world, Path({folder!r}), {max_bytes})
for _ in range({epochs}):
    epoch(source, world)
print(source.num_damaged, flush=True)
"""


def filler(
    world: World, folder: Path, epochs: int = 1, max_bytes: int = 1 << 30
) -> subprocess.Popen[str]:
    code = FILL.format(
        path=[str(Path(__file__).parent), *sys.path],
        tables=str(Path(world.pointers.uri).parent),
        folder=str(folder),
        max_bytes=max_bytes,
        epochs=epochs,
    )
    command = [sys.executable, "-W", "error", "-c", code]
    found = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert found.stdout is not None
    assert found.stdout.readline() == "ready\n"
    return found


def go(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()


def test_processes_that_write_at_once_disturb_nobody(world: World, tmp_path: Path) -> None:
    processes = [filler(world, tmp_path, epochs=2) for _ in range(3)]
    go(*processes)
    for process in processes:
        assert process.communicate()[0] == "0\n"
        assert process.returncode == 0
    source, behind = cached(world, tmp_path)
    assert_right(epoch(source, world), world)
    assert behind.verified == []
    assert files_of(tmp_path, "*.tmp") == []


def test_processes_that_evict_each_others_units_disturb_nobody(
    world: World, tmp_path: Path
) -> None:
    epoch(cached(world, tmp_path)[0], world)
    limit = num_bytes(tmp_path) // 3
    processes = [filler(world, tmp_path, epochs=3, max_bytes=limit) for _ in range(2)]
    go(*processes)
    source, _ = cached(world, tmp_path, limit)
    for _ in range(3):
        assert_right(epoch(source, world), world)
    for process in processes:
        assert process.communicate()[0] == "0\n"
        assert process.returncode == 0
    assert num_bytes(tmp_path) <= limit * (1 + 3 / 16)


def test_a_writer_that_is_killed_leaves_nothing_that_is_read(world: World, tmp_path: Path) -> None:
    for delay in (0.0, 0.02, 0.05, 0.1):
        process = filler(world, tmp_path, epochs=1)
        go(process)
        time.sleep(delay)
        process.kill()
        process.communicate()
    source, _ = cached(world, tmp_path)
    assert_right(epoch(source, world), world)
    assert_right(epoch(source, world), world)
    assert source.num_damaged == 0


def test_what_killed_writers_left_is_swept_but_not_what_is_being_written(
    world: World, tmp_path: Path
) -> None:
    source, _ = cached(world, tmp_path)
    epoch(source, world)
    home = files_of(tmp_path)[0].parent
    left, young = home / "left.tmp", home / "young.tmp"
    for path in (left, young):
        path.write_bytes(b"half")
    os.utime(left, (0, 0))
    cached(world, tmp_path)
    assert files_of(tmp_path, "*.tmp") == [young]


def test_threads_share_a_cache(world: World, tmp_path: Path) -> None:
    source, _ = cached(world, tmp_path)
    found: dict[int, list[UnitData]] = {}

    def read(number: int) -> None:
        found[number] = epoch(source, world)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for units in found.values():
        assert_right(units, world)


def test_the_longest_unused_units_of_others_go_first_and_the_limit_holds(
    world: World, tmp_path: Path
) -> None:
    epoch(cached(world, tmp_path)[0], world)
    total = num_bytes(tmp_path)
    old, recent = files_of(tmp_path)[:5], files_of(tmp_path)[5:]
    for number, path in enumerate(old):
        os.utime(path, (number, number))
    narrow = opened(Path(world.pointers.uri).parent, {"views": Projection(["item_id"])})
    source, _ = cached(narrow, tmp_path, total)
    unit = narrow.plan.units[0]
    source.read(unit, narrow.plan.users_of(unit), verify=True)
    left = files_of(tmp_path)
    assert old[0] not in left
    assert set(recent) < set(left)
    assert num_bytes(tmp_path) <= total
    assert source.num_written == 1


def test_of_an_epoch_larger_than_the_cache_a_part_is_kept(world: World, tmp_path: Path) -> None:
    epoch(cached(world, tmp_path)[0], world)
    limit = num_bytes(tmp_path) // 2
    clear_cache(tmp_path)
    source, _ = cached(world, tmp_path, limit)
    epoch(source, world)
    kept = source.num_written
    assert 0 < kept < len(world.plan.units)
    assert num_bytes(tmp_path) <= limit
    for number in (1, 2):
        assert_right(epoch(source, world), world)
        assert source.num_hits == number * kept
    assert source.num_written == kept


def test_nothing_is_kept_in_no_room(world: World, tmp_path: Path) -> None:
    source, _ = cached(world, tmp_path, 0)
    assert_right(epoch(source, world), world)
    assert files_of(tmp_path, "*.unit") == files_of(tmp_path, "*.tmp") == []
    with pytest.raises(SchemaError, match="cache_bytes=-1"):
        cached(world, tmp_path, -1)


def test_a_full_disk_turns_writing_off_with_one_warning(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_dagster.loaders import cache_file

    source, _ = cached(world, tmp_path)
    units = world.plan.units
    source.read(units[0], world.plan.users_of(units[0]), verify=True)
    failing: list[int] = []

    def full(file: Any, memory: Any) -> None:
        file.write(b"a part of it")
        failing.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_file, "_write_all", full)
    with pytest.warns(RuntimeWarning, match="No space left on device") as warned:
        assert_right(epoch(source, world), world)
    assert len(warned) == len(failing) == 1
    assert_right(epoch(source, world), world)
    assert source.num_hits == 2
    assert len(files_of(tmp_path)) == 1
    assert files_of(tmp_path, "*.tmp") == []


def test_a_folder_that_cannot_be_made_is_refused_and_named(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        cached(world, tmp_path / "file" / "cache")


def test_a_new_folder_is_readable_by_its_owner_only(world: World, tmp_path: Path) -> None:
    cached(world, tmp_path / "cache")
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_clearing_takes_all_units_and_nothing_else(world: World, tmp_path: Path) -> None:
    source, _ = cached(world, tmp_path)
    epoch(source, world)
    (tmp_path / "mine.txt").write_text("keep")
    clear_cache(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    clear_cache(tmp_path / "nowhere")
    # Who was writing there stops: it may have been cleared because of an erasure.
    assert_right(epoch(source, world), world)
    assert files_of(tmp_path) == []


def knowing_of_an_erasure(world: World) -> CacheFacts:
    """The facts of the same tables after an erasure."""
    facts = facts_of(world)
    erased = {table: number + 1 for table, number in facts.erased.items()}
    return CacheFacts({**facts.reads, "erasure": 1}, erased)


def writers(world: World, folder: Path, number: int) -> list[threading.Thread]:
    """Threads that have written a unit each and go on until a unit is not kept any more."""
    units = [(u, world.plan.users_of(u)) for u in world.plan.units[:4]]
    begun = threading.Barrier(number + 1)

    def work() -> None:
        source, _ = cached(world, folder)
        source.read(*units[0], verify=True)
        begun.wait()
        while source._writes:
            for unit, users in units:
                path = source._folder.path_of(source._facts.key_of(unit, users, verify=True))
                path.unlink(missing_ok=True)
                source.read(unit, users, verify=True)

    threads = [threading.Thread(target=work) for _ in range(number)]
    for thread in threads:
        thread.start()
    begun.wait()
    return threads


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_of_before_an_erasure_is_left_by_those_who_write_meanwhile(
    world: World, tmp_path: Path
) -> None:
    after = knowing_of_an_erasure(world)
    for number in range(3):
        threads = writers(world, tmp_path / str(number), 2)
        CachedSource(world.direct(), tmp_path / str(number), after, max_bytes=1 << 30)
        for thread in threads:
            thread.join()
        CachedSource(world.direct(), tmp_path / str(number), after, max_bytes=1 << 30)
        assert names_in(tmp_path / str(number)) == [f"{after.digest}.vlm-units"]
        assert files_of(tmp_path / str(number)) == []


def test_clearing_is_complete_also_while_others_write(world: World, tmp_path: Path) -> None:
    for number in range(3):
        threads = writers(world, tmp_path / str(number), 2)
        clear_cache(tmp_path / str(number))
        assert files_of(tmp_path / str(number)) == []
        for thread in threads:
            thread.join()
        assert names_in(tmp_path / str(number)) == []


def test_who_opened_before_an_erasure_and_writes_first_after_it_puts_nothing_there(
    world: World, tmp_path: Path
) -> None:
    late, _ = cached(world, tmp_path)
    after = knowing_of_an_erasure(world)
    CachedSource(world.direct(), tmp_path, after, max_bytes=1 << 30)
    assert_right(epoch(late, world), world)
    assert late.num_written == 0
    assert names_in(tmp_path) == [f"{after.digest}.vlm-units"]


def test_of_two_that_open_a_cache_at_once_the_one_that_knows_less_sees_the_other(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = knowing_of_an_erasure(world)
    make = CacheFolder._make_home

    def overtaken(folder: CacheFolder, facts: CacheFacts) -> None:
        monkeypatch.setattr(CacheFolder, "_make_home", make)
        CachedSource(world.direct(), tmp_path, after, max_bytes=1 << 30)
        make(folder, facts)

    monkeypatch.setattr(CacheFolder, "_make_home", overtaken)
    late, _ = cached(world, tmp_path)
    assert_right(epoch(late, world), world)
    assert late.num_written == 0
    assert names_in(tmp_path) == [f"{after.digest}.vlm-units"]


def test_a_home_that_vanishes_while_it_is_made_is_no_error(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cleared(home: Path) -> None:
        clear_cache(tmp_path)

    monkeypatch.setattr(cache_folder, "_facts_of", cleared)
    source, _ = cached(world, tmp_path)
    monkeypatch.undo()
    assert_right(epoch(source, world), world)
    assert source.num_written == 0
    assert names_in(tmp_path) == []


def test_what_cannot_be_deleted_is_told(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch(cached(world, tmp_path)[0], world)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(cache_folder.shutil, "rmtree", refuse)
    after = knowing_of_an_erasure(world)
    for _ in range(2):  # also later, when it has another name
        with pytest.warns(RuntimeWarning, match=r"before an erasure.*Permission denied.*Delete it"):
            CachedSource(world.direct(), tmp_path, after, max_bytes=1 << 30)
    # But nobody writes there, or reads from there, any more.
    assert f"{facts_of(world).digest}.vlm-units" not in names_in(tmp_path)
    with pytest.raises(StorageError, match="Permission denied"):
        clear_cache(tmp_path)
    monkeypatch.undo()
    clear_cache(tmp_path)
    assert names_in(tmp_path) == []


def test_a_folder_that_vanishes_ends_nothing(world: World, tmp_path: Path) -> None:
    source, _ = cached(world, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    assert_right(epoch(source, world), world)
    assert not (tmp_path / "cache").exists()


def test_folders_of_others_are_left_alone(world: World, tmp_path: Path) -> None:
    theirs = tmp_path / ("a" * 32)  # as a run of an experiment tracker may be called
    theirs.mkdir()
    for name in ("model.pt", "facts.json", "old.tmp"):
        (theirs / name).write_text("[]")
        os.utime(theirs / name, (0, 0))
    epoch(cached(world, tmp_path)[0], world)
    clear_cache(tmp_path)
    assert sorted(path.name for path in theirs.iterdir()) == ["facts.json", "model.pt", "old.tmp"]


def test_what_is_put_there_is_for_its_owner_only(world: World, tmp_path: Path) -> None:
    epoch(cached(world, tmp_path)[0], world)
    (home,) = tmp_path.iterdir()
    assert home.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in home.iterdir()} == {0o600}


def test_a_unit_larger_than_the_cache_evicts_nothing(world: World, tmp_path: Path) -> None:
    units = sorted(world.plan.units, key=lambda one: one.num_events)
    source, _ = cached(world, tmp_path)
    for unit in units[:3]:
        source.read(unit, world.plan.users_of(unit), verify=True)
    before = files_of(tmp_path)
    for path in before:
        os.utime(path, (0, 0))
    small, _ = cached(world, tmp_path, num_bytes(tmp_path))
    small.read(units[-1], world.plan.users_of(units[-1]), verify=True)
    assert files_of(tmp_path) == before
    small.read(units[0], world.plan.users_of(units[0]), verify=True)
    assert small.num_hits == 1


def test_some_of_the_disk_is_left_to_others(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, _ = cached(world, tmp_path)
    usage = shutil.disk_usage(tmp_path)
    tight = usage._replace(total=100 << 30, free=1 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: tight)
    with caplog.at_level("WARNING"):
        assert_right(epoch(source, world), world)
    assert source.num_written == 0
    assert [record.getMessage().count("nearly full") for record in caplog.records] == [1]
    small = usage._replace(total=64 << 20, free=32 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small)
    epoch(source, world)
    assert source.num_written == len(world.plan.units)


def test_a_failure_of_the_moment_does_not_turn_writing_off(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_many(*given: Any, **named: Any) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    source, _ = cached(world, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "write_unit", too_many)
        epoch(source, world)
    assert source.num_written == 0
    epoch(source, world)
    assert source.num_written == len(world.plan.units)


def test_a_unit_that_is_put_there_again_counts_once(world: World, tmp_path: Path) -> None:
    source, _ = cached(world, tmp_path)
    epoch(source, world, verify=False)
    epoch(source, world, verify=True)
    assert source.num_written == 2 * len(world.plan.units)
    assert source._num_bytes == num_bytes(tmp_path)


def test_threads_that_finish_their_first_units_together_both_keep_them(
    world: World, tmp_path: Path
) -> None:
    together = threading.Barrier(4)

    class Together(Counting):
        def read(self, unit: Unit, user_ids: pa.Array, *, verify: bool) -> UnitData:
            found = super().read(unit, user_ids, verify=verify)
            together.wait()
            return found

    for number in range(10):
        source = CachedSource(
            Together(world.direct()), tmp_path / str(number), facts_of(world), max_bytes=1 << 30
        )
        units = [(u, world.plan.users_of(u)) for u in world.plan.units[:4]]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda one: source.read(*one, verify=True), units))  # noqa: B023
        assert source.num_written == 4


def test_a_source_is_closed_by_a_cache_that_cannot_be_opened(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder, max_bytes in ((tmp_path / "file", 1), (tmp_path, -1)):
        behind = Counting(world.direct())
        with pytest.raises((StorageError, SchemaError)):
            CachedSource(behind, folder, facts_of(world), max_bytes=max_bytes)
        assert behind.closed


def test_a_folder_stays_the_same_when_the_working_directory_changes(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source, _ = cached(world, Path("cache"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    epoch(source, world)
    assert len(files_of(tmp_path / "cache")) == len(world.plan.units)


def test_what_others_left_and_may_not_be_deleted_is_no_obstacle(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch(cached(world, tmp_path)[0], world)
    left = files_of(tmp_path)[0].with_name("left.tmp")
    left.write_bytes(b"half")
    os.utime(left, (0, 0))

    def refuse(*given: Any, **named: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "unlink", refuse)
    source, behind = cached(world, tmp_path)
    assert_right(epoch(source, world), world)
    assert behind.verified == []


def test_a_file_that_claims_to_be_huge_is_read_anew(world: World, tmp_path: Path) -> None:
    epoch(cached(world, tmp_path)[0], world)
    source, behind = cached(world, tmp_path)
    for path in files_of(tmp_path):
        os.truncate(path, 8 << 40)
    assert_right(epoch(source, world), world)
    assert source.num_damaged == len(behind.verified) == len(world.plan.units)


@pytest.mark.parametrize("content", ["[]", "1", '{"erased": null}', "{", ""])
def test_homes_that_say_nothing_readable_are_no_obstacle(
    world: World, tmp_path: Path, content: str
) -> None:
    epoch(cached(world, tmp_path)[0], world)
    (home,) = tmp_path.iterdir()
    (home / "facts.json").write_text(content)
    os.utime(home, (0, 0))
    other = knowing_of_an_erasure(world)
    source, behind = cached(world, tmp_path)
    assert_right(epoch(source, world), world)
    assert behind.verified == []
    assert json.loads((home / "facts.json").read_text())["erased"] == facts_of(world).erased
    # What nobody can tell the age of goes, if it is not one's own.
    (home / "facts.json").write_text(content)
    os.utime(home, (0, 0))
    CachedSource(world.direct(), tmp_path, other, max_bytes=1 << 30)
    assert names_in(tmp_path) == [f"{other.digest}.vlm-units"]


def test_events_of_erased_users_leave_the_cache_when_it_is_opened(tmp_path: Path) -> None:
    world = world_in(tmp_path / "tables", num_events=200, num_users=8)
    folder = tmp_path / "cache"
    epoch(cached(world, folder)[0], world)
    narrow = opened(tmp_path / "tables", {"ratings": Projection(["item_id"], max_length=2)})
    epoch(cached(narrow, folder)[0], narrow)
    only_views = opened(tmp_path / "tables", {"views": Projection(["item_id"])})
    views_facts = facts_of(only_views)
    assert len(list(folder.iterdir())) == 2
    HistoryStore.open(world.histories["ratings"].uri).erase([0], reason="asked for")
    after = opened(tmp_path / "tables")
    source, behind = cached(after, folder)
    (home,) = folder.iterdir()  # its own, with nothing in it yet
    assert json.loads((home / "facts.json").read_text())["erased"] == facts_of(after).erased
    assert files_of(folder) == []
    assert_right(epoch(source, after), after)
    assert len(behind.verified) == len(after.plan.units)
    assert all(
        0 not in unit.examples["user_id"].to_pylist() or not unit.arenas["ratings"].lengths.any()
        for unit in epoch(source, after)
    )
    again, untouched = cached(opened(tmp_path / "tables"), folder)
    assert_right(epoch(again, after), after)
    assert untouched.verified == []
    # Whoever still has the state from before takes nothing away from others, and puts nothing there.
    late = CachedSource(world.direct(), folder, facts_of(world), max_bytes=1 << 30)
    assert not late._writes
    CachedSource(only_views.direct(), folder, views_facts, max_bytes=1 << 30)
    assert_right(epoch(again, after), after)
    assert untouched.verified == []


def test_units_with_something_wrong_are_not_kept(world: World, tmp_path: Path) -> None:
    class Flawed(Counting):
        def read(self, unit: Unit, user_ids: pa.Array, *, verify: bool) -> UnitData:
            found = super().read(unit, user_ids, verify=verify)
            error = ChecksumError(group="ratings", user_id=3, end_position=5, num_bad=1)
            return replace(found, kept=np.arange(found.num_examples) != 1, bad=error)

    behind = Flawed(world.direct())
    source = CachedSource(behind, tmp_path, facts_of(world), max_bytes=1 << 30)
    for _ in range(2):
        assert (
            source.read(
                world.plan.units[0], world.plan.users_of(world.plan.units[0]), verify=True
            ).bad
            is not None
        )
    assert behind.verified == [True, True]
    assert files_of(tmp_path) == []
