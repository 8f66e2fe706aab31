"""Tables that are not what was asked for, and credentials that stay where they are."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from strategies import day, event_table, files_below, group_of, history_of, many_events

from vlm_dagster import FeatureGroup, HistoryStore, PointerDataset, SnapshotRef, Trait
from vlm_dagster.errors import PinError, StorageError, TableError, VlmError
from vlm_dagster.storage import normalize_uri, redact

EVENTS = many_events(seed=0, num_events=40, num_users=5)
GROUP = FeatureGroup("ratings", [Trait("item_id", pa.int64())])


def redeclared(uri: Path, **changes: object) -> None:
    """Rewrite the declaration in the table's first commit."""
    path = uri / "_delta_log" / f"{0:020d}.json"
    lines = []
    for line in path.read_text().splitlines():
        action = json.loads(line)
        if "metaData" in action:
            declared = json.loads(action["metaData"]["description"])
            declared["vlm"].update(changes)
            declared["vlm"] = {k: v for k, v in declared["vlm"].items() if v is not None}
            action["metaData"]["description"] = json.dumps(declared)
        lines.append(json.dumps(action, separators=(",", ":")))
    path.write_text("\n".join(lines))


# -- other tables ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [HistoryStore, PointerDataset])
def test_where_there_is_no_table_it_says_so(tmp_path: Path, cls: type) -> None:
    with pytest.raises(TableError, match="no Delta table here"):
        cls.open(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_delta_table_of_somebody_elses_is_not_ours(tmp_path: Path) -> None:
    write_deltalake(tmp_path, pa.table({"x": [1]}))
    for reach in (HistoryStore.open, lambda uri: HistoryStore.create(uri, GROUP)):
        with pytest.raises(TableError, match="not one of ours"):
            reach(tmp_path)


@pytest.mark.parametrize("description", ["", "a table", "[]", "{}", '{"vlm": 1}', '{"vlm": {}}'])
def test_no_description_can_confuse_it(tmp_path: Path, description: str) -> None:
    DeltaTable.create(str(tmp_path), pa.schema([("x", pa.int64())]), description=description)
    with pytest.raises(TableError, match="not one of ours"):
        HistoryStore.open(tmp_path)


def test_a_table_of_another_kind_names_both(tmp_path: Path) -> None:
    HistoryStore.create(tmp_path / "history", GROUP)
    PointerDataset.create(tmp_path / "pointers", ["ratings"])
    with pytest.raises(TableError, match="pointers table, not a history table"):
        HistoryStore.open(tmp_path / "pointers")
    with pytest.raises(TableError, match="history table, not a pointers table"):
        PointerDataset.open(tmp_path / "history")


def test_a_table_of_a_newer_format_asks_for_an_upgrade(tmp_path: Path) -> None:
    HistoryStore.create(tmp_path, GROUP)
    redeclared(tmp_path, format=99)
    with pytest.raises(TableError, match=r"format 99, newer.*Upgrade"):
        HistoryStore.open(tmp_path)


def test_a_declaration_without_a_kind_is_not_ours(tmp_path: Path) -> None:
    HistoryStore.create(tmp_path, GROUP)
    redeclared(tmp_path, kind=None)
    with pytest.raises(TableError, match="not one of ours"):
        HistoryStore.open(tmp_path)


def test_a_damaged_log_is_a_table_error(tmp_path: Path) -> None:
    HistoryStore.create(tmp_path, GROUP)
    (tmp_path / "_delta_log" / f"{0:020d}.json").write_text("{not json")
    with pytest.raises(VlmError):
        HistoryStore.open(tmp_path)


def test_a_file_where_the_table_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises((TableError, StorageError)):
        HistoryStore.create(tmp_path / "file", GROUP)


# -- declarations ---------------------------------------------------------------------------------


def test_creating_it_again_opens_it(tmp_path: Path) -> None:
    first = HistoryStore.create(tmp_path, GROUP, 4, windows="hourly", start="2020-01-01-00:00")
    again = HistoryStore.create(tmp_path, GROUP, 4, windows="hourly", start="2020-01-01-00:00")
    opened = HistoryStore.open(tmp_path)
    for store in (again, opened):
        assert (store.table_id, store.group, store.num_buckets) == (first.table_id, GROUP, 4)
        assert store.grid.cadence == "hourly"
        assert store.snapshot().watermark == "2020-01-01T00:00:00Z"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_buckets": 8}, "num_buckets = 4, not 8"),
        ({"windows": "weekly"}, "windows = 'daily', not 'weekly'"),
        ({"start": "1999-01-01"}, "start = None, not '1999-01-01'"),
        ({"group": FeatureGroup("ratings", [Trait("item_id", pa.int32())])}, "int32"),
        ({"group": FeatureGroup("clicks", GROUP.traits)}, "clicks"),
        ({"group": FeatureGroup("ratings", GROUP.traits, duplicates="first")}, "first"),
    ],
)
def test_creating_it_otherwise_is_refused(tmp_path: Path, change: dict, words: str) -> None:
    HistoryStore.create(tmp_path, GROUP, 4)
    before = files_below(tmp_path)
    with pytest.raises(TableError, match=words):
        HistoryStore.create(tmp_path, **{"group": GROUP, "num_buckets": 4, **change})
    assert files_below(tmp_path) == before


# -- versions and identity ------------------------------------------------------------------------


@pytest.mark.parametrize("version", [99, -1, 10**30, "1", 1.0])
def test_a_version_that_does_not_exist_is_refused(tmp_path: Path, version: object) -> None:
    store = history_of(tmp_path, EVENTS)
    with pytest.raises(TableError, match="version"):
        store.snapshot(version)  # type: ignore[arg-type]


def test_a_table_that_vanished_is_missed(tmp_path: Path) -> None:
    store = history_of(tmp_path / "history", EVENTS)
    ref, snapshot = store.snapshot().ref(), store.snapshot()
    shutil.rmtree(tmp_path / "history")
    for act in (
        store.snapshot,
        ref.open,
        lambda: store.seal(day(9), event_table([], store.group)),
        lambda: snapshot.read([1]),
    ):
        with pytest.raises(VlmError):
            act()
    assert not (tmp_path / "history" / "_delta_log").exists()


def test_another_table_at_the_same_place_is_noticed(tmp_path: Path) -> None:
    store = history_of(tmp_path, EVENTS)
    ref, staged = store.snapshot().ref(), store.stage(day(4), event_table([], store.group))
    shutil.rmtree(tmp_path)
    other = history_of(tmp_path, EVENTS)
    with pytest.raises(TableError, match="another table lies here now"):
        store.snapshot()
    with pytest.raises(TableError, match="another table lies here now"):
        store.seal(day(4), event_table([], store.group))
    with pytest.raises(PinError, match="table id"):
        ref.open()
    with pytest.raises(TableError, match="staged for table"):
        other.commit(staged)


def test_a_pin_whose_content_is_not_there_is_refused(tmp_path: Path) -> None:
    ref = history_of(tmp_path, EVENTS).snapshot().ref()
    forged = SnapshotRef.from_json({**ref.to_json(), "digest": "0" * 64})
    with pytest.raises(PinError, match="0000"):
        forged.open()
    with pytest.raises(TableError, match="version 99"):
        SnapshotRef.from_json({**ref.to_json(), "version": 99}).open()


def test_a_moved_table_opens_where_it_lies_now(tmp_path: Path) -> None:
    ref = history_of(tmp_path / "here", EVENTS).snapshot().ref()
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(TableError, match="no Delta table here"):
        ref.open()
    assert ref.open(uri=str(tmp_path / "there")).digest == ref.digest


def test_a_pin_survives_json_and_pickling(tmp_path: Path) -> None:
    ref = history_of(tmp_path, EVENTS).snapshot().ref()
    assert SnapshotRef.from_json(json.loads(json.dumps(ref.to_json()))) == ref
    assert pickle.loads(pickle.dumps(ref)) == ref
    assert hash(ref) == hash(SnapshotRef.from_json(ref.to_json()))


# -- addresses and credentials --------------------------------------------------------------------

SECRET = "s3cr3t-k3y"


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://key:{SECRET}@bucket/table",
        f"s3://{SECRET}@bucket/table",
        f"https://host/table?sig={SECRET}",
        f"https://host/table#{SECRET}",
        f"abfss://container:{SECRET}@account.dfs.core.windows.net/table",
    ],
)
def test_an_address_that_carries_credentials_is_refused_without_repeating_them(uri: str) -> None:
    assert SECRET not in redact(uri)
    for reach in (HistoryStore.open, lambda u: HistoryStore.create(u, GROUP), PointerDataset.open):
        with pytest.raises(TableError, match="carries credentials") as caught:
            reach(uri)
        assert SECRET not in str(caught.value)
        assert SECRET not in repr(caught.value)
        assert SECRET not in repr(vars(caught.value))


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/a/b",
        "abfss://container@account.dfs.core.windows.net/a",
        "memory:///x",
        "gs://b",
    ],
)
def test_a_plain_address_is_kept_whole(uri: str) -> None:
    assert normalize_uri(uri) == uri
    assert normalize_uri(uri + "/") == uri


def test_local_addresses_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert normalize_uri("a/b") == str(tmp_path / "a" / "b")
    assert normalize_uri(f"file://{tmp_path}/a%20b") == f"{tmp_path}/a b"
    for bad in ("", "a\nb", "a\0b"):
        with pytest.raises(TableError, match="not a path"):
            normalize_uri(bad)
    with pytest.raises(TableError, match="escape"):
        normalize_uri("a%20b")


@pytest.mark.parametrize("name", ["with space", "ünïcode", "100%", "a=b", "a#b", "a?b", "it's"])
def test_a_table_may_lie_in_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    store = history_of(tmp_path / name, EVENTS)
    snapshot = SnapshotRef.from_json(store.snapshot().ref().to_json()).open()
    assert snapshot.read([0]).num_events > 0
    assert snapshot.verify(deep=True).ok
    assert store.sweep(older_than_s=0) == []


def test_storage_options_are_never_stored_or_shown(tmp_path: Path) -> None:
    options = {"aws_secret_access_key": SECRET, "token": SECRET}
    group = group_of(EVENTS)
    store = HistoryStore.create(tmp_path / "history", group, 2, storage_options=options)
    staged = store.stage(day(0), event_table(EVENTS[:0], group))
    sealed = store.commit(staged)
    snapshot = HistoryStore.open(tmp_path / "history", storage_options=options).snapshot()
    dataset = PointerDataset.create(
        tmp_path / "pointers", ["ratings"], request="request_time", storage_options=options
    )
    requests = pa.table(
        {
            "user_id": pa.array([], pa.int64()),
            "request_id": pa.array([], pa.int64()),
            "request_time": pa.array([], pa.timestamp("us", "UTC")),
        }
    )
    dataset.seal(day(0), requests, {"ratings": snapshot.ref()})
    handles = [staged, sealed, snapshot.ref(), dataset.ref(), snapshot.verify()]
    for handle in [*handles, store, dataset, snapshot, dataset.snapshot()]:
        assert SECRET not in repr(handle)
    for handle in handles:
        assert SECRET.encode() not in pickle.dumps(handle)
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes()


def test_errors_of_storage_do_not_show_its_options(tmp_path: Path) -> None:
    options = {"aws_access_key_id": "key", "aws_secret_access_key": SECRET, "aws_region": "nowhere",
               "aws_endpoint": "http://127.0.0.1:9", "allow_http": "true", "max_retries": "0",
               "timeout": "1s"}  # fmt: skip
    with pytest.raises(VlmError) as caught:
        HistoryStore.open("s3://bucket/table", storage_options=options)
    seen: BaseException | None = caught.value
    while seen is not None:
        assert SECRET not in f"{seen} {seen!r}"
        seen = seen.__cause__ or seen.__context__
