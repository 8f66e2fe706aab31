"""Files that are not what was sealed: verifying names them, and reading never returns wrong rows."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from deltalake.transaction import AddAction
from strategies import (
    day,
    events_of_day,
    history_of,
    many_events,
    request_table,
)

from vlm_dagster import HistoryStore, PointerDataset, Projection, Snapshot
from vlm_dagster.errors import CorruptFileError, TableError, VlmError

EVENTS = many_events(seed=0, num_events=2_000, num_users=50)


@pytest.fixture
def store(tmp_path: Path) -> HistoryStore:
    return history_of(tmp_path / "history", EVENTS, num_buckets=2)


def fresh(store: HistoryStore) -> Snapshot:
    """Opened anew: nothing is remembered of the files."""
    return HistoryStore.open(store.uri).snapshot()


def one_file(store: HistoryStore, row: int = 3) -> Path:
    return Path(store.uri, store.snapshot().files()["path"][row].as_py())


def check_it_is_named(store: HistoryStore, path: Path, *words: str, deep: bool = False) -> None:
    report = fresh(store).verify(deep=deep)
    assert not report.ok
    assert len(report.problems) == 1, report.problems
    for word in (path.name, *words):
        assert word in report.problems[0]
    assert "Restore the file" in report.problems[0]


def test_what_was_sealed_verifies(store: HistoryStore) -> None:
    seen: list[int] = []
    report = fresh(store).verify(deep=True, progress=seen.append)
    assert report.ok
    assert (report.num_files, report.num_rows, report.num_windows) == (8, len(EVENTS), 4)
    assert sum(seen) == report.num_bytes
    assert sum(p.stat().st_size for p in Path(store.uri).rglob("bucket=*/*")) == report.num_bytes
    assert fresh(store).verify().num_rows == 0
    assert fresh(store).verify(windows=[day(0)], deep=True).num_files == 2


def test_a_missing_file_is_named(store: HistoryStore) -> None:
    path = one_file(store)
    path.unlink()
    check_it_is_named(store, path, "is missing")
    with pytest.raises(CorruptFileError, match=path.name):
        fresh(store).read(fresh_users())


def fresh_users() -> list[int]:
    return sorted({event["user_id"] for event in EVENTS})


def test_a_file_that_goes_missing_while_it_is_read_is_named(store: HistoryStore) -> None:
    path, snapshot = one_file(store), fresh(store)
    snapshot.read(fresh_users())
    path.unlink()
    with pytest.raises(CorruptFileError, match="is missing"):
        snapshot.read(fresh_users())


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.99])
def test_a_file_that_was_cut_short_is_named(store: HistoryStore, keep: float) -> None:
    path = one_file(store)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    check_it_is_named(store, path, f"{len(whole)} were sealed")
    with pytest.raises(CorruptFileError, match=path.name):
        fresh(store).read(fresh_users())


def test_a_flipped_bit_is_found_and_never_read_as_rows(store: HistoryStore) -> None:
    path = one_file(store)
    whole = path.read_bytes()
    good = fresh(store).read(fresh_users())
    rng = random.Random(0)
    # Pages and our index carry checksums. Parquet's own part of the footer has none: verifying finds
    # what is wrong there by the hash of the whole file.
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    places = [*rng.sample(range(footer), 60), *range(len(whole) - 24, len(whole))]
    for at in places:
        broken = bytearray(whole)
        broken[at] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        report = fresh(store).verify()
        assert not report.ok
        assert path.name in report.problems[0]
        try:
            read = fresh(store).read(fresh_users())
        except CorruptFileError as error:
            assert path.name in str(error)  # noqa: PT017
        else:  # it hit what reading does not need: statistics, page indices, names of writers
            assert read.columns == good.columns
    path.write_bytes(whole)
    assert fresh(store).verify(deep=True).ok


def test_files_put_in_each_others_place_are_named(store: HistoryStore) -> None:
    first, second = one_file(store, 0), one_file(store, 1)
    swap = first.with_name("swap")
    first.rename(swap)
    second.rename(first)
    swap.rename(second)
    problems = fresh(store).verify().problems
    assert [any(path.name in problem for problem in problems) for path in (first, second)] == [
        True
    ] * 2


def test_another_buckets_file_is_not_read_as_this_ones(store: HistoryStore) -> None:
    """Even with the right size: the file says which table, window and bucket it is of."""
    files = store.snapshot().files().to_pylist()
    first = next(f for f in files if f["bucket"] == 0)
    second = next(f for f in files if f["bucket"] == 1 and f["segment"] == first["segment"])
    shutil.copy(Path(store.uri, second["path"]), Path(store.uri, first["path"]))
    with pytest.raises(CorruptFileError, match=Path(first["path"]).name):
        fresh(store).read(fresh_users())


def test_a_file_of_a_newer_format_asks_for_an_upgrade(
    store: HistoryStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vlm_dagster.sealed import reader, writer

    with monkeypatch.context() as patch:
        patch.setattr(writer, "FILE_FORMAT", 99)
        newer = history_of(tmp_path / "newer", EVENTS[:10])
    with pytest.raises(VlmError, match=r"format 99, newer.*Upgrade"):
        newer.snapshot().read([0])
    assert reader.FILE_FORMAT == 2


def test_a_copy_restores_a_damaged_table(store: HistoryStore, tmp_path: Path) -> None:
    path = one_file(store)
    shutil.copy(path, tmp_path / "copy")
    path.write_bytes(b"damaged")
    assert not fresh(store).verify().ok
    shutil.copy(tmp_path / "copy", path)
    assert fresh(store).verify(deep=True).ok


# -- other writers --------------------------------------------------------------------------------


def test_a_foreign_rewrite_reads_right_and_older_pins_still_read(store: HistoryStore) -> None:
    pin = store.snapshot().ref()
    before = pin.open().read(fresh_users())
    DeltaTable(store.uri).optimize.z_order(["item_id"])
    assert DeltaTable(store.uri).version() > pin.version
    rewritten = fresh(store)
    assert rewritten.read(fresh_users()).columns == before.columns
    newest = rewritten.read(fresh_users(), Projection(["item_id"], max_length=3))
    own = pin.open().read(fresh_users(), Projection(["item_id"], max_length=3))
    assert newest.columns == own.columns
    assert rewritten.user_ids() == pin.open().user_ids()
    report = rewritten.verify()
    assert report.ok
    assert report.num_rows == rewritten.num_events  # only its rows can speak for it
    assert pin.open().read(fresh_users()).columns == before.columns
    assert pin.open().verify(deep=True).ok


def test_a_foreign_rewrite_that_changed_a_value_is_found(store: HistoryStore) -> None:
    """Same rows but one value: only the digest tells, and `verify` looks at it."""
    file = store.snapshot().files().to_pylist()[0]
    path = Path(store.uri, file["path"])
    table = pq.read_table(path, partitioning=None).replace_schema_metadata(None)
    items = table["item_id"].to_numpy().copy()
    items[0] += 1
    at = table.schema.get_field_index("item_id")
    changed = table.set_column(at, table.schema.field(at), pa.array(items, table["item_id"].type))
    pq.write_table(changed, path)
    rewrite_size_in_log(store, file["path"], path.stat().st_size)
    report = fresh(store).verify()
    assert any("add up to" in problem for problem in report.problems)


def rewrite_size_in_log(store: HistoryStore, path: str, size: int) -> None:
    for log in sorted(Path(store.uri, "_delta_log").glob("*.json")):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        for action in lines:
            if action.get("add", {}).get("path") == path:
                action["add"]["size"] = size
        log.write_text("\n".join(json.dumps(line) for line in lines))


def test_rows_that_another_writer_appended_are_refused(store: HistoryStore) -> None:
    pin = store.snapshot().ref()
    rows = {
        **{f.name: pa.array([EVENTS[0][f.name]], f.type) for f in store.group.stored_schema},
        "segment": [day(0)],
        "bucket": pa.array([0], pa.int32()),
    }
    write_deltalake(store.uri, pa.table(rows), mode="append")
    DeltaTable(store.uri).optimize.compact()
    for act in (
        lambda s: s.read([0]),
        lambda s: s.user_ids(),
        lambda s: list(s.column_chunks("item_id")),
    ):
        with pytest.raises(TableError, match=rf"window {day(0)} should have.*another writer"):
            act(fresh(store))
    assert not fresh(store).verify().ok
    assert pin.open().verify(deep=True).ok


def test_rows_that_somebody_appended_are_not_read(store: HistoryStore) -> None:
    """Files in a sealed window that no seal put there: refused, even with an index of their own."""
    table = DeltaTable(store.uri)
    files = store.snapshot().files().to_pylist()
    source = next(f for f in files if f["bucket"] == 0)
    copy = Path(store.uri, source["path"]).with_name("0" * 64 + ".parquet")
    shutil.copy(Path(store.uri, source["path"]), copy)
    table.create_write_transaction(
        [
            AddAction(
                copy.relative_to(store.uri).as_posix(),
                source["size_bytes"],
                {"segment": source["segment"], "bucket": "0"},
                0,
                True,
                json.dumps({"numRecords": source["num_rows"]}),
            )
        ],
        "append",
        table.schema(),
        ["segment", "bucket"],
    )
    assert not fresh(store).verify().ok
    with pytest.raises(TableError, match="another writer"):
        fresh(store).read(fresh_users())


def test_the_table_refuses_deletes_of_other_writers(store: HistoryStore) -> None:
    with pytest.raises(Exception, match=r"(?i)append"):
        DeltaTable(store.uri).delete("user_id = 0")
    assert fresh(store).verify(deep=True).ok


# -- pointer datasets -----------------------------------------------------------------------------


def test_pointer_datasets_verify_likewise(store: HistoryStore, tmp_path: Path) -> None:
    dataset = PointerDataset.create(tmp_path / "pointers", ["ratings"], num_buckets=2)
    for number in (1, 2):
        asked = events_of_day(EVENTS, number)
        table = request_table(asked, pa.int64(), ["user_id", "event_id"], pa.int64())
        dataset.seal(day(number), table, {"ratings": store.snapshot()})
    ref = dataset.ref()
    assert ref.open().verify(deep=True).ok
    assert dataset.snapshot([day(1)]).verify(deep=True).num_files == 2
    path = Path(dataset.uri, dataset.snapshot([day(2)]).files()["path"][0].as_py())
    path.unlink()
    assert path.name in ref.open().verify().problems[0]
    assert dataset.snapshot([day(1)]).verify(deep=True).ok
    with pytest.raises(CorruptFileError, match=path.name):
        ref.open().to_table()
