"""The command line, as a user meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from vlm_dagster import FeatureGroup, HistoryStore, PointerDataset, Trait

GROUP = FeatureGroup("ratings", [Trait("item_id", pa.int64())])
DAYS = ("1997-09-20", "1997-09-21")


def cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vlm_dagster", *arguments],
        env={**os.environ, "COLUMNS": "200", **environment},
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )


def told(*arguments: str, **environment: str) -> str:
    done = cli(*arguments, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(*arguments: str, **environment: str) -> str:
    done = cli(*arguments, **environment)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    store = HistoryStore.create(folder / "history", GROUP, num_buckets=2)
    pointers = PointerDataset.create(folder / "pointers", ["ratings"], num_buckets=2)
    for number, day in enumerate(DAYS):
        events = pa.table(
            {
                "user_id": [1, 2],
                "event_id": [2 * number, 2 * number + 1],
                "event_time": pa.array([f"{day}T10:00:00Z"] * 2).cast(pa.timestamp("us", "UTC")),
                "item_id": [10, 20],
            }
        )
        store.seal(day, events)
        pointers.seal(day, events.select(["user_id", "event_id"]), {"ratings": store.snapshot()})
    return folder


def test_inspect_shows_windows_digests_and_the_watermark(tables: Path) -> None:
    shown = told("inspect", str(tables / "history"))
    facts = json.loads(told("inspect", str(tables / "history"), "--json"))
    assert facts["watermark"] == "1997-09-22T00:00:00Z"
    assert facts["num_events"] == 4
    assert [w["window"] for w in facts["windows"]] == list(DAYS)
    assert "1997-09-22T00:00:00Z" in shown
    assert all(day in shown for day in DAYS)


def test_inspect_shows_a_window_with_its_files_and_pins(tables: Path) -> None:
    facts = json.loads(told("inspect", str(tables / "pointers"), "--window", DAYS[1], "--json"))
    (window,) = facts["windows"]
    assert {f["segment"] for f in window["files"]} == {DAYS[1]}
    assert window["pins"]["ratings"]["version"] == 2


def test_inspect_at_a_version_shows_what_was_there_then(tables: Path) -> None:
    facts = json.loads(told("inspect", str(tables / "history"), "--version", "1", "--json"))
    assert facts["num_events"] == 2


def test_compact_merges_and_inspect_shows_segments_bands_and_columns(tmp_path: Path) -> None:
    store = HistoryStore.create(tmp_path / "history", GROUP, num_buckets=1, bands=(2,))
    for day in (*DAYS, "1997-09-22"):
        times = pa.array([f"{day}T10:00:00Z"] * 4).cast(pa.timestamp("us", "UTC"))
        columns = {"user_id": [1, 1, 1, 2], "event_id": [1, 2, 3, 4], "event_time": times}
        store.seal(day, pa.table({**columns, "item_id": [7, 8, 9, 10]}))
    planned = json.loads(told("compact", store.uri, "--fanout", "2", "--dry-run", "--json"))
    assert (planned["segments_before"], planned["segments_after"]) == (3, 2)
    assert store.snapshot().version == 3
    assert "3 segments became 2" in told("compact", store.uri, "--fanout", "2")
    assert "nothing to compact" in told("compact", store.uri, "--fanout", "2")
    facts = json.loads(told("inspect", store.uri, "--json"))
    names = [segment["name"] for segment in facts["segments"]]
    assert names == ["1997-09-20..1997-09-21", "1997-09-22"]
    assert [(b["edge"], b["num_rows"]) for b in facts["bands"]] == [(2, 7), (None, 5)]
    assert sum(c["stored"] for c in facts["columns"]) == facts["num_bytes"]
    files = json.loads(told("inspect", store.uri, "--window", DAYS[1], "--json"))["windows"]
    assert [f["segment"] for f in files[0]["files"]] == [names[0]]
    shown = told("inspect", store.uri)
    assert all(word in shown for word in (*names, "0 to 1", "2 and beyond", "item_id", "█"))
    assert "no Delta table here" in refused("compact", str(tmp_path))


def test_lineage_leads_from_pointers_to_files(tables: Path) -> None:
    found = json.loads(told("lineage", str(tables / "pointers"), "--files", "--json"))
    assert [source["version"] for source in found["from"]] == [1, 2]
    assert all(source["files"] for source in found["from"])
    assert "complete up to 1997-09-21T00:00:00Z" in told("lineage", str(tables / "pointers"))


def test_verify_finds_a_damaged_file_and_ends_with_1(tmp_path: Path) -> None:
    store = HistoryStore.create(tmp_path / "history", GROUP, num_buckets=1)
    store.seal(DAYS[0], [])
    store.seal(
        DAYS[1],
        pa.table(
            {
                "user_id": [1],
                "event_id": [1],
                "event_time": pa.array(["1997-09-21T10:00:00Z"]).cast(pa.timestamp("us", "UTC")),
                "item_id": [10],
            }
        ),
    )
    assert "intact" in told("verify", "--deep", store.uri)
    (path,) = store.snapshot().files()["path"].to_pylist()
    file = Path(store.uri, path)
    file.write_bytes(file.read_bytes()[:-1])
    done = cli("verify", store.uri)
    assert done.returncode == 1
    assert path in done.stdout.replace("\n", "")
    problems = json.loads(cli("verify", "--json", store.uri).stdout)
    assert not problems["ok"]


def test_sweep_lists_left_overs_and_deletes_them_when_told(tmp_path: Path) -> None:
    store = HistoryStore.create(tmp_path / "history", GROUP, num_buckets=1)
    orphan = tmp_path / "history" / "segment=1997-09-20" / "bucket=0" / "left.parquet"
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"x")
    assert "0 files" in told("sweep", store.uri)
    assert "would be deleted" in told("sweep", store.uri, "--older-than-hours", "0")
    assert orphan.exists()
    told("sweep", store.uri, "--older-than-hours", "0", "--delete")
    assert not orphan.exists()


def test_mistakes_get_one_message_and_no_traceback(tmp_path: Path) -> None:
    assert "there is nothing here" in refused("inspect", str(tmp_path / "nowhere"))
    assert "no Delta table here" in refused("inspect", str(tmp_path))
    missing = str(tmp_path / "missing.csv")
    home = {"VLM_HOME": str(tmp_path / "home")}
    assert "missing.csv" in refused("demo", "--events", missing, "--format", "movielens", **home)
    assert "belong together" in refused("demo", "--events", missing, **home)
    assert "unknown" in refused("demo", "--windows", "yearly", **home)
    assert "make demo" in refused("ui", **home)
    secret = refused("inspect", "s3://key:secret@bucket/table")
    assert "secret" not in secret.replace("secrets", "")


def test_generated_events_are_a_file_a_day(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    told(
        "generate", str(folder), "--users", "20", "--days", "3", "--longest", "100", "--items", "60"
    )
    assert sorted(p.name for p in folder.glob("*.parquet")) == [
        f"events-2025-01-0{day}.parquet" for day in (1, 2, 3)
    ]


def test_the_demo_ends_with_its_figures_as_one_json_line(tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    arguments = ("demo", "--users", "60", "--days", "4", "--max-seconds", "5")
    printed = told(*arguments, VLM_HOME=home)
    figures = json.loads(printed.splitlines()[-1])
    assert figures["windows"] == 4
    assert figures["examples"] == figures["events"] > 0
    assert figures["fat_rows"]["by_time"] > 0
    assert 0 <= figures["evaluation"]["model"]["hr@10"] <= 1
    assert "windows sealed" in printed
    again = json.loads(told(*arguments, VLM_HOME=home).splitlines()[-1])
    assert again["history_digest"] == figures["history_digest"]
    assert again["history_version"] == figures["history_version"]
    told("verify", "--deep", figures["checkpoint"])
    other = refused("demo", "--users", "61", "--days", "4", VLM_HOME=home)
    assert "other data" in other


def test_erase_drop_and_correct_are_on_record(tables: Path, tmp_path: Path) -> None:
    import shutil

    import pyarrow.parquet as pq

    history, pointers = str(tmp_path / "history"), str(tmp_path / "pointers")
    for name in ("history", "pointers"):
        shutil.copytree(tables / name, tmp_path / name)
    users = tmp_path / "users.txt"
    users.write_text("2\n\n77\n")
    asked = ("erase", history, pointers, "--users", str(users), "--reason", "ticket 7")
    assert "2 users have 2 rows in 2 segments" in told(*asked, "--dry-run")
    text = told(*asked)
    assert "erased 2 rows of 2 users from 2 segments" in text
    facts = json.loads(told("inspect", history, "--json"))
    assert (facts["num_events"], facts["num_events_gone"]) == (2, 2)
    (removal,) = facts["removals"]
    assert (removal["kind"], removal["reason"], removal["done"]) == ("erasure", "ticket 7", True)
    assert json.loads(told("inspect", pointers, "--json"))["num_examples"] == 2
    shown = told("inspect", history)
    assert "ticket 7" in shown
    assert "erasure" in shown

    events = HistoryStore.open(history).snapshot().read([1])
    file = tmp_path / "day.parquet"
    day = DAYS[1]
    pq.write_table(
        pa.table(
            {
                "user_id": [1],
                "event_id": [2],
                "event_time": pa.array([f"{day}T10:00:00Z"]).cast(pa.timestamp("us", "UTC")),
                "item_id": [99],
            }
        ),
        file,
    )
    text = told("correct", history, day, str(file), "--reason", "wrong item")
    assert f"window {day} is revision 2" in text
    assert "1 events" in text
    assert "nothing was changed" in told("correct", history, day, str(file), "--reason", "again")
    assert "2 (wrong item)" in told("inspect", history)
    assert HistoryStore.open(history).snapshot().read([1]).num_events == events.num_events

    assert "would drop 1 windows" in told("drop", history, "--before", day)
    assert "dropped 1 windows" in told("drop", history, "--before", day, "--delete")
    assert "nothing to drop" in told("drop", history, "--before", day, "--delete")
    assert told("verify", "--deep", history).endswith("intact\n")

    bad = tmp_path / "bad.txt"
    bad.write_text("1\ntwo\n")
    message = refused("erase", history, "--users", str(bad), "--reason", "x")
    assert "line 2" in message
    assert "'two'" in message
    assert "cannot be read" in refused("erase", history, "--users", "nowhere", "--reason", "x")
    assert "is not there" in refused("correct", history, day, "nowhere", "--reason", "x")
    assert "not a history table" in refused("drop", pointers, "--before", day)
