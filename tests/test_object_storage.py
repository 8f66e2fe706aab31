"""Tables on an object store, over S3's own HTTP interface (moto serves it on this machine)."""

from __future__ import annotations

import pickle
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from vlm_dagster import (
    FeatureGroup,
    HistoryStore,
    PointerDataset,
    Projection,
    SequenceLoader,
    Trait,
)
from vlm_dagster.errors import CorruptFileError, TableError, WindowSealedError
from vlm_dagster.windows import WindowGrid

SECRET = "not-to-be-told"
GROUP = FeatureGroup("ratings", [Trait("item_id", pa.int64())])
DAY = WindowGrid("daily").parse("1997-09-20")
_SERVE = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def options() -> Iterator[dict[str, str]]:
    """Storage options of a server that lives as long as these tests."""
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _SERVE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    endpoint = f"http://127.0.0.1:{int(server.stdout.readline())}"
    with urllib.request.urlopen(urllib.request.Request(f"{endpoint}/lake", method="PUT")):
        pass
    yield {
        "aws_access_key_id": "somebody",
        "aws_secret_access_key": SECRET,
        "aws_region": "us-east-1",
        "aws_endpoint_url": endpoint,
        "aws_allow_http": "true",
        "aws_conditional_put": "etag",
    }
    server.stdin.close()
    server.wait(timeout=20)
    server.stdout.close()


def events(shift: int = 0) -> pa.Table:
    times = pa.array([DAY.start_us + i for i in range(4)], pa.timestamp("us", "UTC"))
    return pa.table(
        {
            "user_id": [1, 2, 1, 1],
            "event_id": [1, 2, 3, 4],
            "event_time": times,
            "item_id": [10 + shift, 20, 30, 40],
        }
    )


def seal(uri: str, options: dict[str, str], shift: int) -> str:
    store = HistoryStore.create(uri, GROUP, num_buckets=2, storage_options=options)
    try:
        return "reused" if store.seal(DAY, events(shift)).reused else "committed"
    except WindowSealedError:
        return "refused"


def test_sealing_reading_and_loading(options: dict[str, str]) -> None:
    store = HistoryStore.create("s3://lake/h", GROUP, num_buckets=2, storage_options=options)
    sealed = store.seal(DAY, events())
    assert store.seal(DAY, events()).reused
    with pytest.raises(WindowSealedError):
        store.seal(DAY, events(1))
    snapshot = HistoryStore.open("s3://lake/h", storage_options=options).snapshot(sealed.version)
    found = snapshot.read([1, 2], Projection(["item_id"], max_length=2))
    assert [found.of(i)["item_id"].to_pylist() for i in (0, 1)] == [[30, 40], [20]]
    assert snapshot.verify(deep=True).ok
    pointers = PointerDataset.create(
        "s3://lake/p", ["ratings"], num_buckets=2, storage_options=options
    )
    requests = events().select(["user_id", "event_id"])
    pointers.seal(DAY, requests, {"ratings": snapshot.ref()})
    (batch,) = SequenceLoader(
        pointers.ref(),
        {"ratings": Projection(["item_id"])},
        order="stored",
        storage_options=options,
    )
    lengths = dict(
        zip(
            batch.examples["request_id"].tolist(),
            batch.sequences["ratings"].lengths.tolist(),
            strict=True,
        )
    )
    assert lengths == {1: 0, 2: 0, 3: 1, 4: 2}
    assert store.sweep(older_than_s=0) == []


def test_windows_are_corrected_and_users_erased(options: dict[str, str]) -> None:
    uri = "s3://lake/changed"
    store = HistoryStore.create(uri, GROUP, num_buckets=2, storage_options=options)
    store.seal(DAY, events())
    assert store.correct(DAY, events(1), reason="wrong items").revision == 2
    report = store.erase([2], reason="ticket 7")
    assert report.num_rows == 1
    assert report.num_files_deleted > 0
    snapshot = HistoryStore.open(uri, storage_options=options).snapshot()
    found = snapshot.read([1, 2], Projection(["item_id"]))
    assert [found.of(i)["item_id"].to_pylist() for i in (0, 1)] == [[11, 30, 40], []]
    assert found.end_positions.tolist() == [3, 1]
    assert snapshot.verify(deep=True).ok


def test_of_racing_processes_one_commits(options: dict[str, str]) -> None:
    context = get_context("spawn")
    with ProcessPoolExecutor(4, mp_context=context) as pool:
        shifts = [0, 0, 1, 1]
        outcomes = list(pool.map(seal, ["s3://lake/race"] * 4, [options] * 4, shifts))
    assert outcomes.count("committed") == 1
    assert outcomes.count("reused") == 1
    assert outcomes.count("refused") == 2
    store = HistoryStore.open("s3://lake/race", storage_options=options)
    assert store.snapshot().num_events == 4
    assert store.snapshot().verify(deep=True).ok


def test_a_lost_file_is_named(options: dict[str, str]) -> None:
    store = HistoryStore.create("s3://lake/lost", GROUP, num_buckets=1, storage_options=options)
    store.seal(DAY, events())
    (path,) = store.snapshot().files()["path"].to_pylist()
    store._table.storage.delete(path)
    fresh = HistoryStore.open("s3://lake/lost", storage_options=options).snapshot()
    with pytest.raises(CorruptFileError, match="is missing") as raised:
        fresh.read([1])
    assert raised.value.path == path


def test_credentials_stay_in_the_options(options: dict[str, str]) -> None:
    store = HistoryStore.create("s3://lake/quiet", GROUP, num_buckets=1, storage_options=options)
    staged = store.stage(DAY, events())
    store.commit(staged)
    told = [repr(store), str(store.snapshot().ref().to_json()), repr(pickle.dumps(staged))]
    wrong = {**options, "aws_endpoint_url": "http://127.0.0.1:9", "max_retries": "0"}
    with pytest.raises((TableError, OSError)) as raised:
        HistoryStore.open("s3://lake/quiet", storage_options=wrong)
    told.append(str(raised.value))
    assert not any(SECRET in text for text in told)


def test_versions_are_collected_and_pins_replay(options: dict[str, str]) -> None:
    uri, to = "s3://lake/collected", "s3://lake/collected-pointers"
    store = HistoryStore.create(uri, GROUP, num_buckets=2, storage_options=options)
    pointers = PointerDataset.create(to, ["ratings"], num_buckets=2, storage_options=options)
    for number in range(4):
        window = WindowGrid("daily").at(DAY.index + number)
        shift = pa.scalar(number * (DAY.end_us - DAY.start_us), pa.duration("us"))
        table = events()
        at = table.schema.get_field_index("event_time")
        table = table.set_column(at, "event_time", pc.add(table["event_time"], shift))
        store.seal(window, table)
        if number == 1:
            requests = table.select(["user_id", "event_id"])
            pointers.seal(window, requests, {"ratings": store.snapshot()})
    store.compact(fanout=2)
    (pin,) = pointers.ref().pins
    before = pin.open(options).read([1, 2]).columns
    store.pin("first", 1)
    planned = store.gc(keep_hours=0)
    assert [kept.version for kept in planned.holding.kept][1:] == [pin.version, 1]
    done = store.gc(keep_hours=0, dry_run=False)
    assert {f.path for f in done.purged.files} == {f.path for f in planned.purged.files}
    assert done.purged.num_files > 0
    again = HistoryStore.open(uri, storage_options=options)
    assert pin.open(options).read([1, 2]).columns == before
    assert again.pinned_as("first").verify(deep=True).ok
    again.unpin("first")
    again.gc(keep_hours=0, move_pins=True, dry_run=False)
    assert pin.open(options).read([1, 2]).columns == before
    entries = list(again.sealed_table.storage.list("_referrers"))
    (text,) = (again.sealed_table.storage.read_bytes(info.path).decode() for info in entries)
    assert SECRET not in text
