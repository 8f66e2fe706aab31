"""A training run enters itself where it reads, so that what it was trained on is kept."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from retention import EVENTS, at_version, compacted, requests_of
from strategies import day, events_of_day

from vlm_dagster import HistoryStore, PointerDataset, Trait
from vlm_dagster.errors import SchemaError, StorageError, TableError
from vlm_dagster.models import HSTUConfig
from vlm_dagster.retention.referrers import Referrer, read_referrers, register
from vlm_dagster.storage import LocalStorage
from vlm_dagster.training.checkpoint import read_manifest
from vlm_dagster.training.config import TrainingConfig
from vlm_dagster.training.interrupt import StopRequest
from vlm_dagster.training.referring import referring
from vlm_dagster.training.reporting import Reporter
from vlm_dagster.training.session import run
from vlm_dagster.training.world import World


@pytest.fixture
def store(tmp_path: Path) -> HistoryStore:
    return compacted(tmp_path / "history")


@pytest.fixture
def dataset(store: HistoryStore, tmp_path: Path) -> PointerDataset:
    dataset = PointerDataset.create(
        tmp_path / "pointers", ["ratings"], [Trait("item_id", pa.int64())], num_buckets=2
    )
    for number in (2, 5):
        items = pa.array([e["item_id"] for e in events_of_day(EVENTS, number)])
        requests = requests_of(number).append_column("item_id", items)
        dataset.seal(day(number), requests, {"ratings": store.snapshot(number + 1)})
    return dataset


@pytest.fixture
def config(dataset: PointerDataset, tmp_path: Path) -> TrainingConfig:
    return TrainingConfig(
        train_pointers=dataset.ref([day(2)]).to_json(),
        eval_pointers=dataset.ref([day(5)]).to_json(),
        checkpoint_dir=str(tmp_path / "run"),
        group="ratings",
        model=HSTUConfig(max_length=4, dim=8, num_layers=1, num_heads=1),
        batch_size=64,
        max_steps=1,
        num_threads=1,
        device="cpu",
        eval_top_k=(1,),
    )


def checkpoints_in(table: HistoryStore | PointerDataset) -> list[str]:
    return [one.uri for one in read_referrers(table.sealed_table) if one.kind == "checkpoint"]


def test_a_run_is_held_by_its_tables_while_it_trains_and_ever_after(
    store: HistoryStore, dataset: PointerDataset, config: TrainingConfig
) -> None:
    version = dataset.snapshot().version
    pinned = sorted(pin.version for pin in dataset.ref().pins)
    before = [at_version(store, one) for one in pinned]
    assert run(config, World(), StopRequest(), Reporter(enabled=False, pipes=None)) == 0
    assert read_manifest(config.checkpoint_dir).metrics["num_steps"] == 1
    for table in (store, dataset):
        assert checkpoints_in(table) == [config.checkpoint_dir]
    held = dataset.gc(keep_hours=0, dry_run=False).holding.kept
    assert {hold.what for one in held for hold in one.holds} == {"train", "eval"}
    assert held[-1].version == version
    shutil.rmtree(dataset.uri)
    store.gc(keep_hours=0, forget=[dataset.uri], dry_run=False)
    assert [at_version(store, one) for one in pinned] == before


def test_a_run_that_saves_nothing_leaves_no_entry(
    store: HistoryStore, dataset: PointerDataset, config: TrainingConfig
) -> None:
    with pytest.raises(SchemaError, match="nope"):
        run(
            replace(config, item_trait="nope"),
            World(),
            StopRequest(),
            Reporter(enabled=False, pipes=None),
        )
    assert checkpoints_in(store) == checkpoints_in(dataset) == []
    with referring(config):
        assert checkpoints_in(store) == checkpoints_in(dataset) == [config.checkpoint_dir]
    assert checkpoints_in(store) == []


def test_a_run_that_cannot_enter_itself_does_not_begin(
    store: HistoryStore, config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(self: LocalStorage, data: bytes, path: str) -> bool:
        raise StorageError(self.uri, f"writing {path}", PermissionError(13, "denied"))

    # In the history a folder around it stands for it; in the pointer dataset nothing does.
    register(store.sealed_table, Referrer.checkpoint(str(Path(config.checkpoint_dir).parent)))
    monkeypatch.setattr(LocalStorage, "put_new", read_only)
    with pytest.raises(TableError, match=r"pointers: .*cannot be entered.*vlm-dagster refer"):
        run(config, World(), StopRequest(), Reporter(enabled=False, pipes=None))
    assert not Path(config.checkpoint_dir).exists()
