"""End to end against a live webserver: runs are launched and looked at through GraphQL, as the UI does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vlm_dagster.demo.settings import default_settings
from vlm_dagster.events import GeneratorConfig
from vlm_dagster.history import HistoryStore
from vlm_dagster.pointers import PointerRef
from vlm_dagster.training.checkpoint import read_manifest

ROOT = Path(__file__).resolve().parent.parent
DAYS = ["2025-01-01", "2025-01-02", "2025-01-03", "2025-01-04"]
SELECTOR = {"repositoryLocationName": "vlm_dagster", "repositoryName": "__repository__"}
RANGE = ("dagster/asset_partition_range_start", "dagster/asset_partition_range_end")

pytestmark = pytest.mark.slow

# No daemon runs here to take runs off a queue.
INSTANCE = """
telemetry: {enabled: false}
run_coordinator: {module: dagster.core.run_coordinator, class: DefaultRunCoordinator}
"""
LAUNCH = """
mutation Launch($params: ExecutionParams!) {
  launchPipelineExecution(executionParams: $params) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on PythonError { message }
    ... on RunConfigValidationInvalid { errors { message } }
  }
}
"""
RUN = """
query Run($runId: ID!) {
  runOrError(runId: $runId) {
    ... on Run {
      status
      eventConnection(limit: 500) {
        events { __typename ... on ExecutionStepFailureEvent { stepKey error { message } } }
      }
    }
  }
}
"""
ASSET = """
query Asset($key: AssetKeyInput!, $partitions: [String!]) {
  assetNodeOrError(assetKey: $key) {
    ... on AssetNode {
      groupName
      kinds
      assetMaterializations(partitions: $partitions, limit: 1) {
        partition
        tags { key value }
        metadataEntries {
          label
          ... on TextMetadataEntry { text }
          ... on IntMetadataEntry { intValue }
          ... on FloatMetadataEntry { floatValue }
          ... on BoolMetadataEntry { boolValue }
          ... on JsonMetadataEntry { jsonString }
          ... on MarkdownMetadataEntry { mdStr }
          ... on PathMetadataEntry { path }
        }
      }
      assetChecksOrError {
        ... on AssetChecks {
          checks { name blocking executionForLatestMaterialization { status } }
        }
      }
    }
  }
}
"""
AUTOMATION = """
query Automation($selector: RepositorySelector!) {
  repositoryOrError(repositorySelector: $selector) {
    ... on Repository {
      schedules { name scheduleState { status } }
      sensors { name sensorType sensorState { status } }
    }
  }
}
"""


class Server:
    """A webserver process on a fresh home with a small made-up data set."""

    def __init__(self, home: Path, port: int) -> None:
        self.home = home
        self._url = f"http://127.0.0.1:{port}/graphql"
        self._log = (home / "webserver.log").open("w")
        environment = {**os.environ, "VLM_HOME": str(home), "DAGSTER_HOME": str(home / "dagster")}
        command = ["-m", "dagster_webserver", "-w", "workspace.yaml", "-h", "127.0.0.1"]
        self._process = subprocess.Popen(
            [sys.executable, *command, "-p", str(port)],
            cwd=ROOT,
            env=environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def ask(self, query: str, **variables: Any) -> Any:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(
            self._url, body, {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert "errors" not in answer, answer["errors"]
        (found,) = answer["data"].values()
        return found

    def wait_until_ready(self, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self._process.poll() is None, (self.home / "webserver.log").read_text()
            try:
                if "schedules" in self.ask(AUTOMATION, selector=SELECTOR):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                pass
            time.sleep(0.5)
        raise AssertionError((self.home / "webserver.log").read_text())

    def launch(
        self, *names: str, tags: dict[str, str] | None = None, config: Any = None
    ) -> tuple[str, list[str]]:
        """Launch a run of some assets and wait; its status and the errors of its steps."""
        launched = self.ask(
            LAUNCH,
            params={
                "selector": {
                    **SELECTOR,
                    "pipelineName": "__ASSET_JOB",
                    "assetSelection": [{"path": [name]} for name in names],
                },
                "runConfigData": config or {},
                "mode": "default",
                "executionMetadata": {
                    "tags": [{"key": k, "value": v} for k, v in (tags or {}).items()]
                },
            },
        )
        assert launched["__typename"] == "LaunchRunSuccess", launched
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            run = self.ask(RUN, runId=launched["run"]["runId"])
            if run["status"] in ("SUCCESS", "FAILURE", "CANCELED"):
                events = run["eventConnection"]["events"]
                return run["status"], [e["error"]["message"] for e in events if e.get("error")]
            time.sleep(0.5)
        raise AssertionError((self.home / "webserver.log").read_text())

    def asset(self, name: str, partition: str | None = None) -> dict[str, Any]:
        partitions = None if partition is None else [partition]
        return dict(self.ask(ASSET, key={"path": [name]}, partitions=partitions))

    def facts(self, name: str, partition: str | None = None) -> dict[str, Any]:
        """Metadata and tags of the newest materialization."""
        (found,) = self.asset(name, partition)["assetMaterializations"]
        assert found["partition"] == partition
        facts = {tag["key"]: tag["value"] for tag in found["tags"]}
        for entry in found["metadataEntries"]:
            values = [v for k, v in entry.items() if k != "label" and v is not None]
            facts[entry["label"]] = values[0] if values else None
        return facts


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    settings = default_settings(
        GeneratorConfig(num_users=60, num_items=80, num_topics=5, num_days=4, longest_history=100)
    )
    model = {"max_length": 16, "dim": 8, "num_layers": 1, "num_heads": 1}
    training = {"model": model, "max_steps": 3, "num_workers": 0, "num_threads": 1}
    replace(settings, eval_share=0.2, training=training).save(home)
    (home / "dagster").mkdir()
    (home / "dagster" / "dagster.yaml").write_text(INSTANCE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = Server(home, port)
    try:
        found.wait_until_ready()
        yield found
    finally:
        found.close()


def test_the_schedule_and_the_sensor_are_running(server: Server) -> None:
    found = server.ask(AUTOMATION, selector=SELECTOR)
    assert found["schedules"] == [
        {"name": "seal_complete_windows", "scheduleState": {"status": "RUNNING"}}
    ]
    assert found["sensors"] == [
        {
            "name": "train_on_new_pointers",
            "sensorType": "AUTO_MATERIALIZE",
            "sensorState": {"status": "RUNNING"},
        }
    ]


def test_from_events_to_an_evaluated_model(server: Server) -> None:
    assert server.launch("raw_events") == ("SUCCESS", [])
    assert server.facts("raw_events")["num_windows"] == 4

    span = dict(zip(RANGE, (DAYS[0], DAYS[3]), strict=True))
    assert server.launch("interactions_history", "interactions_pointers", tags=span) == (
        "SUCCESS",
        [],
    )
    store = HistoryStore.open(server.home / "tables" / "interactions_history")
    digests = {sealed.window.key: sealed.digest for sealed in store.snapshot().windows}
    assert list(digests) == DAYS
    for number, day in enumerate(DAYS, start=1):
        facts = server.facts("interactions_history", day)
        assert facts["dagster/data_version"] == facts["digest"] == digests[day]
        assert facts["version"] == number
        pins = json.loads(server.facts("interactions_pointers", day)["pins"])
        assert pins["interactions"]["version"] == number
    for name, num_checks in (("interactions_history", 1), ("interactions_pointers", 3)):
        checks = server.asset(name, DAYS[0])["assetChecksOrError"]["checks"]
        assert len(checks) == num_checks
        for check in checks:
            assert check["blocking"], check
            assert check["executionForLatestMaterialization"]["status"] == "SUCCEEDED", check

    assert server.launch("ranker", "ranker_evaluation") == ("SUCCESS", [])
    ranker = server.facts("ranker")
    manifest = read_manifest(ranker["dagster/uri"])
    assert ranker["dagster/data_version"] == manifest.weights_digest
    assert ranker["training/num_steps"] == 3
    pinned = json.loads(ranker["pins"])["pointers"]
    trained = PointerRef.from_json(manifest.pins["train"])
    assert pinned["digest"] == trained.digest
    assert tuple(pinned["windows"]) == trained.windows == tuple(DAYS[:3])
    snapshots = [pin.open() for pin in trained.pins]  # back to the very bytes
    assert [snapshot.version for snapshot in snapshots] == [1, 2, 3]
    evaluation = server.facts("ranker_evaluation")
    assert 0 <= evaluation["eval/model/hr@10"] <= 1
    assert "NDCG@10" in evaluation["summary"]
    assert json.loads(evaluation["checkpoint"])["digest"] == manifest.digest


@pytest.fixture
def sealed(server: Server) -> Server:
    """Histories of all days, whichever of these tests runs first in this process."""
    if not server.asset("interactions_history", DAYS[1])["assetMaterializations"]:
        assert server.launch("raw_events") == ("SUCCESS", [])
        span = dict(zip(RANGE, (DAYS[0], DAYS[3]), strict=True))
        assert server.launch("interactions_history", tags=span) == ("SUCCESS", [])
    return server


def test_the_same_window_again_is_green_and_reused(sealed: Server) -> None:
    server = sealed
    day = {"dagster/partition": DAYS[1]}
    before = server.facts("interactions_history", DAYS[1])
    assert server.launch("interactions_history", tags=day) == ("SUCCESS", [])
    after = server.facts("interactions_history", DAYS[1])
    assert after["reused"] is True
    for name in ("dagster/data_version", "version", "digest"):
        assert after[name] == before[name]


def test_other_content_fails_in_the_ui_with_both_digests(sealed: Server) -> None:
    server = sealed
    digest = server.facts("interactions_history", DAYS[1])["digest"]
    landing = server.home / "landing" / "windows"
    other, moved = landing / f"{DAYS[1]}.parquet", landing / "kept"
    manifest = server.home / "landing" / "landing.json"
    text = manifest.read_text()
    other.rename(moved)
    try:
        import pyarrow.parquet as pq

        table = pq.read_table(moved)
        pq.write_table(table.slice(1), other)
        size, new_size = moved.stat().st_size, other.stat().st_size
        manifest.write_text(text.replace(f'"num_bytes": {size},', f'"num_bytes": {new_size},'))
        status, errors = server.launch("interactions_history", tags={"dagster/partition": DAYS[1]})
    finally:
        moved.rename(other)
        manifest.write_text(text)
    assert status == "FAILURE"
    (message,) = [error for error in errors if "is sealed with digest" in error]
    assert digest in message
    assert message.count("vlm1-") == 2
    assert "A sealed window never changes" in message
