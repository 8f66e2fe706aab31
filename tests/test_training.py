"""Training and evaluation, through real tables, processes, signals, torchrun and Dagster Pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pytest
import torch

from vlm_dagster import FeatureGroup, HistoryStore, PointerDataset, Trait
from vlm_dagster.errors import SchemaError, TrainingError
from vlm_dagster.models import HSTU, CategoricalTrait, HSTUConfig, ModelInputs
from vlm_dagster.training.checkpoint import load_checkpoint, read_manifest
from vlm_dagster.training.config import TrainingConfig
from vlm_dagster.training.data import open_loader, train_vocabulary
from vlm_dagster.training.evaluate import main as evaluate_main
from vlm_dagster.training.evaluation import EVALUATION, evaluate, evaluate_checkpoint
from vlm_dagster.training.features import to_model_inputs
from vlm_dagster.training.loop import StepReport, train
from vlm_dagster.training.run import main as run_main
from vlm_dagster.training.vocabulary import Vocabulary
from vlm_dagster.training.world import World

NUM_USERS, NUM_ITEMS, NUM_DAYS = 40, 30, 8
DAYS = [f"2024-03-{day:02d}" for day in range(1, NUM_DAYS + 1)]
DAY_US = 24 * 3_600_000_000
FIRST_US = 1_709_251_200_000_000  # 2024-03-01


def day_of_events(day: int) -> pa.Table:
    """12 events a user; each item follows from the one before, and a like from the item.
    On the last day a new item, 999, turns up."""
    users = np.repeat(np.arange(NUM_USERS), 12)
    turn = np.tile(np.arange(12), NUM_USERS) + 12 * day
    items = 100 + (users * 7 + turn * (1 + users % 2)) % NUM_ITEMS
    if day == NUM_DAYS - 1:
        items = np.where(turn == turn.max(), 999, items)
    times = FIRST_US + day * DAY_US + (np.tile(np.arange(12), NUM_USERS) * 60 + users) * 1_000_000
    return pa.table(
        {
            "user_id": pa.array(users),
            "event_id": pa.array(turn),
            "event_time": pa.array(times, pa.timestamp("us", "UTC")),
            "item_id": pa.array(items),
            "action": pa.array((items % 3).astype(np.int8)),
        }
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PointerDataset:
    """Histories all sealed first, so that every pointer pins a snapshot that knows the future."""
    folder = tmp_path_factory.mktemp("tables")
    group = FeatureGroup("plays", [Trait("item_id", pa.int64()), Trait("action", pa.int8())])
    store = HistoryStore.create(folder / "plays", group, num_buckets=4)
    for day, key in enumerate(DAYS):
        store.seal(key, day_of_events(day))
    pointers = PointerDataset.create(
        folder / "pointers",
        ["plays"],
        [Trait("item_id", pa.int64()), Trait("liked", pa.bool_())],
        num_buckets=4,
    )
    for day, key in enumerate(DAYS):
        events = day_of_events(day)
        liked = pa.array(events["item_id"].to_numpy() % 2 == 0)
        requests = events.select(["user_id", "event_id", "item_id"]).append_column("liked", liked)
        pointers.seal(key, requests, {"plays": store.snapshot()})
    return pointers


@pytest.fixture
def config(dataset: PointerDataset, tmp_path: Path) -> TrainingConfig:
    return TrainingConfig(
        train_pointers=dataset.ref(DAYS[:-2]).to_json(),
        eval_pointers=dataset.ref(DAYS[-2:]).to_json(),
        checkpoint_dir=str(tmp_path / "checkpoint"),
        group="plays",
        label_column="liked",
        model=HSTUConfig(
            max_length=16,
            dim=16,
            num_layers=1,
            num_heads=2,
            traits=(CategoricalTrait("action", 3),),
        ),
        batch_size=64,
        learning_rate=1e-2,
        warmup_steps=5,
        max_steps=60,
        epochs=4,
        num_threads=1,
        device="cpu",
        eval_top_k=(1, 10),
    )


def write(config: TrainingConfig, path: Path) -> str:
    path.write_text(json.dumps(config.to_json()))
    return str(path)


def run_in_process(config: TrainingConfig, tmp_path: Path) -> dict[str, Any]:
    assert run_main(["--config", write(config, tmp_path / "config.json")]) == 0
    value: dict[str, Any] = json.loads((Path(config.checkpoint_dir) / EVALUATION).read_text())
    return value


# -- a whole run --------------------------------------------------------------------------------


def test_a_run_learns_what_popularity_cannot(
    config: TrainingConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = run_in_process(config, tmp_path)
    assert result["model"]["hr@10"] > 0.8
    assert result["model"]["hr@1"] > 2 * result["popularity"]["hr@1"]
    assert result["label"]["ne"] < 1
    assert result["num_examples"] == result["num_evaluated"] == 2 * NUM_USERS * 12
    assert result["num_unknown_targets"] == NUM_USERS  # item 999, which training never saw

    manifest = read_manifest(config.checkpoint_dir)
    assert result["checkpoint_digest"] == manifest.digest
    assert manifest.pins == {"train": config.train_pointers, "eval": config.eval_pointers}
    assert manifest.num_items == NUM_ITEMS + 1
    assert manifest.metrics["num_steps"] == 60
    assert manifest.metrics["stopped_by"] == "max_steps"
    told = capfd.readouterr().err
    assert "30 items from 2,880 events" in told
    assert "40 targets unknown, counted as misses" in told


def test_the_same_config_gives_the_same_weights_and_another_seed_does_not(
    config: TrainingConfig, tmp_path: Path
) -> None:
    config = replace(config, max_steps=10, eval_pointers=None)
    digests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        one = replace(config, seed=seed, checkpoint_dir=str(tmp_path / name))
        assert run_main(["--config", write(one, tmp_path / f"{name}.json")]) == 0
        digests.append(read_manifest(one.checkpoint_dir).weights_digest)
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_a_run_without_labels_evaluates_next_items_only(
    config: TrainingConfig, tmp_path: Path
) -> None:
    result = run_in_process(replace(config, label_column=None, max_steps=3), tmp_path)
    assert result["label"] is None
    assert load_checkpoint(config.checkpoint_dir).model.label_head is None


def test_the_vocabulary_ends_where_training_ends_though_the_history_goes_on(
    config: TrainingConfig,
) -> None:
    vocabulary = train_vocabulary(config)
    assert 999 not in vocabulary.ids.tolist()
    assert int(vocabulary.counts.sum()) == (NUM_DAYS - 2) * NUM_USERS * 12


def test_an_old_evaluation_does_not_outlive_its_checkpoint(
    config: TrainingConfig, tmp_path: Path
) -> None:
    run_in_process(replace(config, max_steps=2), tmp_path)
    again = replace(config, max_steps=3, eval_pointers=None)
    assert run_main(["--config", write(again, tmp_path / "config.json")]) == 0
    assert not (Path(config.checkpoint_dir) / EVALUATION).exists()


# -- evaluation ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_model() -> HSTU:
    torch.manual_seed(3)
    return HSTU(
        HSTUConfig(max_length=16, dim=8, num_layers=1, num_heads=2, label_head=True), NUM_ITEMS + 1
    )


def evaluated(model: HSTU, config: TrainingConfig, **options: Any) -> dict[str, Any]:
    config = replace(config, model=model.config, **options)
    assert config.eval_pointers is not None
    loader = open_loader(config.eval_pointers, config, World(), shuffle=False)
    vocabulary = train_vocabulary(config)
    result = evaluate(model, vocabulary, loader, config, num_examples=loader.num_examples)
    del result["seconds"]
    return result


def test_an_evaluation_does_not_depend_on_the_batch_size(
    small_model: HSTU, config: TrainingConfig
) -> None:
    one, other = (evaluated(small_model, config, eval_batch_size=size) for size in (7, 500))
    assert one["model"] == pytest.approx(other["model"])
    assert one["popularity"] == pytest.approx(other["popularity"])
    assert one["label"] == pytest.approx(other["label"])


def test_the_newest_example_of_each_user_is_the_last_one(
    small_model: HSTU, config: TrainingConfig
) -> None:
    for size in (7, 500):
        result = evaluated(small_model, config, eval_examples="last_per_user", eval_batch_size=size)
        assert result["num_examples"] == 2 * NUM_USERS * 12
        assert result["num_evaluated"] == NUM_USERS
        # Everybody's last event of the last day is the new item.
        assert result["num_unknown_targets"] == NUM_USERS
        assert result["model"]["hr@10"] == result["popularity"]["hr@10"] == 0
        assert result["label"]["num_examples"] == NUM_USERS


def test_a_sample_is_about_as_large_as_asked_and_always_the_same(
    small_model: HSTU, config: TrainingConfig
) -> None:
    one, other = (
        evaluated(small_model, config, eval_max_examples=300, eval_batch_size=size)
        for size in (7, 500)
    )
    assert 240 < one["num_evaluated"] < 360
    assert one["num_evaluated"] == other["num_evaluated"]
    assert one["model"] == pytest.approx(other["model"])


def test_seen_items_can_be_left_out_of_the_ranking(
    small_model: HSTU, config: TrainingConfig
) -> None:
    plain = evaluated(small_model, config)
    unseen = evaluated(small_model, config, eval_exclude_seen=True)
    assert unseen["exclude_seen"] is True
    assert unseen["popularity"]["mrr"] != plain["popularity"]["mrr"]


def test_evaluating_again_by_command_gives_the_same_result(
    config: TrainingConfig, tmp_path: Path
) -> None:
    config = replace(config, max_steps=5)
    first = run_in_process(config, tmp_path)
    path = Path(config.checkpoint_dir) / EVALUATION
    path.unlink()
    options = ["--checkpoint", config.checkpoint_dir, "--config", str(tmp_path / "config.json")]
    assert evaluate_main(options) == 0
    again = json.loads(path.read_text())
    first.pop("seconds")
    again.pop("seconds")
    assert again == first


def test_evaluating_with_another_model_shape_is_refused(
    config: TrainingConfig, tmp_path: Path
) -> None:
    run_in_process(replace(config, max_steps=1), tmp_path)
    other = replace(config, model=replace(config.model, dim=32))
    with pytest.raises(TrainingError, match="is not the checkpoint's"):
        evaluate_checkpoint(load_checkpoint(config.checkpoint_dir), other, World())


# -- the loop -----------------------------------------------------------------------------------


def batches_of(config: TrainingConfig) -> list[ModelInputs]:
    vocabulary = train_vocabulary(config)
    loader = open_loader(config.train_pointers, config, World(), shuffle=True)
    return [to_model_inputs(batch, vocabulary, config) for batch in loader]


def make_model(config: TrainingConfig) -> HSTU:
    torch.manual_seed(0)
    return HSTU(config.model, NUM_ITEMS + 1)


def test_training_stops_at_the_first_limit_it_meets(config: TrainingConfig) -> None:
    batches = batches_of(config)[:4]
    reports: list[StepReport] = []

    def trained(**limits: Any) -> Any:
        reports.clear()
        limited = replace(config, max_steps=None, **limits)
        model = make_model(config)
        return train(model, lambda epoch: batches, limited, on_step=reports.append)

    summary = trained(epochs=2)
    assert (summary.num_steps, summary.num_epochs, summary.stopped_by) == (8, 2, "epochs")
    assert [(r.step, r.epoch) for r in reports] == [(i + 1, i // 4) for i in range(8)]
    assert summary.num_examples == sum(r.num_examples for r in reports)
    assert summary.next_item_loss == pytest.approx(sum(r.next_item_loss for r in reports) / 8)

    limited = replace(config, max_steps=3)
    summary = train(make_model(config), lambda epoch: batches, limited)
    assert (summary.num_steps, summary.num_epochs, summary.stopped_by) == (3, 0, "max_steps")

    summary = trained(epochs=1000, max_seconds=0.3)
    assert summary.stopped_by == "max_seconds"
    assert 0 < summary.num_steps < 4000


def test_a_loss_that_is_not_finite_stops_with_its_step_and_batch(config: TrainingConfig) -> None:
    model, batches = make_model(config), batches_of(config)[:3]

    def spoil(report: StepReport) -> None:
        if report.step == 2:
            with torch.no_grad():
                model.start.fill_(float("nan"))

    with pytest.raises(TrainingError, match=r"step 3: the loss is not finite .*epoch 0, batch 2"):
        train(model, lambda epoch: batches, config, on_step=spoil)


def test_nothing_to_train_on_is_an_error(config: TrainingConfig) -> None:
    with pytest.raises(TrainingError, match="hold no example"):
        train(make_model(config), lambda epoch: [], config)


def test_columns_that_do_not_fit_are_named(config: TrainingConfig) -> None:
    vocabulary = Vocabulary(torch.tensor([100]), torch.tensor([0, 1]))
    batch = next(iter(open_loader(config.train_pointers, config, World(), shuffle=True)))
    with pytest.raises(SchemaError, match=r"no column 'candidate'.*liked"):
        to_model_inputs(batch, vocabulary, replace(config, target_column="candidate"))
    with pytest.raises(SchemaError, match="label column 'item_id' holds 1"):
        to_model_inputs(batch, vocabulary, replace(config, label_column="item_id"))
    with pytest.raises(TrainingError, match=r"no history of group 'clicks'.*plays"):
        train_vocabulary(replace(config, group="clicks"))


# -- processes ----------------------------------------------------------------------------------


def launch(command: list[str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command], text=True, stderr=subprocess.PIPE, **options
    )


def test_a_bad_config_ends_with_one_clear_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_main(["--config", str(tmp_path / "none.json")]) == 1
    assert "error: training config" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_leaves_a_whole_checkpoint(
    config: TrainingConfig, tmp_path: Path, number: signal.Signals
) -> None:
    endless = replace(config, epochs=10_000, max_steps=None)
    path = write(endless, tmp_path / "config.json")
    process = launch(["-m", "vlm_dagster.training.run", "--config", path])
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step"):
            break
    process.send_signal(number)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert "stopped by a signal after" in told
    assert "Traceback" not in told
    manifest = read_manifest(config.checkpoint_dir)
    assert manifest.metrics["stopped_by"] == "interrupt"
    load_checkpoint(config.checkpoint_dir)


def torchrun(*arguments: str) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]


@pytest.mark.slow
def test_two_ranks_train_and_evaluate_every_example_once(
    config: TrainingConfig, tmp_path: Path
) -> None:
    config = replace(config, epochs=1, max_steps=None)
    path = write(config, tmp_path / "config.json")
    process = launch(torchrun("-m", "vlm_dagster.training.run", "--config", path))
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 0, told
    assert "training on 2 x cpu" in told
    manifest = read_manifest(config.checkpoint_dir)
    assert manifest.metrics["num_examples"] == (NUM_DAYS - 2) * NUM_USERS * 12
    assert manifest.environment["num_ranks"] == 2
    result = json.loads((Path(config.checkpoint_dir) / EVALUATION).read_text())
    alone = evaluate_checkpoint(load_checkpoint(config.checkpoint_dir), config, World())
    for name in ("num_examples", "num_evaluated", "num_unknown_targets"):
        assert result[name] == alone[name]
    assert result["model"] == pytest.approx(alone["model"])
    assert result["label"] == pytest.approx(alone["label"])


SPLIT_SCRIPT = """
import sys, torch
from vlm_dagster.models import HSTU
from vlm_dagster.training.loop import train
from vlm_dagster.training.world import open_world

sys.path.insert(0, {tests!r})
from test_training import halves, split_config
with open_world("cpu", num_threads=1) as world:
    config = split_config()
    torch.manual_seed(world.rank)
    model = HSTU(config.model, 31).double()
    if world.rank == 0:
        model.load_state_dict(torch.load({start!r}, weights_only=True))
    mine = halves()[world.rank]
    summary = train(model, lambda epoch: mine, config, world=world)
    assert summary.num_examples == 38, summary
    if world.rank == 0:
        torch.save(model.state_dict(), {end!r})
"""


def split_config() -> TrainingConfig:
    model = HSTUConfig(max_length=6, dim=8, num_layers=1, num_heads=2, dropout=0.0)
    return TrainingConfig(train_pointers={}, checkpoint_dir="-", label_column="liked", model=model)


def random_inputs(lengths: list[int], seed: int) -> ModelInputs:
    g = torch.Generator().manual_seed(seed)
    total, batch = sum(lengths), len(lengths)
    return ModelInputs(
        items=torch.randint(0, 31, (total,), generator=g),
        times_us=torch.zeros(total, dtype=torch.int64),
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        query_time_us=torch.randint(0, 10**9, (batch,), generator=g),
        targets=torch.randint(0, 31, (batch,), generator=g),
        labels=torch.randint(0, 2, (batch,), generator=g).float(),
    )


def halves() -> list[list[ModelInputs]]:
    """Rank 0 has three batches and rank 1 two, of other sizes."""
    first = [random_inputs([i % 7 for i in range(n)], seed) for seed, n in enumerate((9, 4, 5))]
    second = [random_inputs([(i * 3) % 7 for i in range(n)], 9 + n) for n in (13, 7)]
    return [first, second]


def joined(parts: list[ModelInputs]) -> ModelInputs:
    def cat(pick: Callable[[ModelInputs], Any]) -> torch.Tensor:
        return torch.cat([pick(part) for part in parts])

    lengths = cat(lambda p: p.lengths)
    return ModelInputs(
        items=cat(lambda p: p.items),
        times_us=cat(lambda p: p.times_us),
        offsets=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        query_time_us=cat(lambda p: p.query_time_us),
        targets=cat(lambda p: p.targets),
        labels=cat(lambda p: p.labels),
    )


@pytest.mark.slow
def test_two_uneven_ranks_learn_what_one_process_learns_from_their_batches_joined(
    tmp_path: Path,
) -> None:
    config = split_config()
    torch.manual_seed(5)
    model = HSTU(config.model, 31).double()
    start, end = str(tmp_path / "start.pt"), str(tmp_path / "end.pt")
    torch.save(model.state_dict(), start)
    script = tmp_path / "ranks.py"
    script.write_text(SPLIT_SCRIPT.format(tests=os.path.dirname(__file__), start=start, end=end))
    process = launch(torchrun(str(script)))
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 0, told

    first, second = halves()
    batches = [joined([first[0], second[0]]), joined([first[1], second[1]]), first[2]]
    train(model, lambda epoch: batches, config)
    for name, tensor in torch.load(end, weights_only=True).items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-6, atol=1e-8)


# Dagster's own Pipes session calls what Dagster has deprecated or previews.
@pytest.mark.filterwarnings("ignore:Function `PipesMessageReader.expected_writer_count`")
@pytest.mark.filterwarnings("ignore:AssetExecutionContext.run_id is deprecated:DeprecationWarning")
@pytest.mark.slow
def test_a_run_reports_to_dagster_through_pipes(config: TrainingConfig, tmp_path: Path) -> None:
    path = write(replace(config, max_steps=5), tmp_path / "config.json")
    messages: list[Any] = []

    @dg.asset
    def trained(context):  # type: ignore[no-untyped-def]  # Dagster reads annotations as values
        invocation = dg.PipesSubprocessClient().run(
            context=context,
            command=[sys.executable, "-m", "vlm_dagster.training.run", "--config", path],
        )
        messages.extend(invocation.get_custom_messages())
        return invocation.get_materialize_result()

    result = dg.materialize([trained])
    assert result.success
    materialization = result.asset_materializations_for_node("trained")[0]
    metadata = materialization.metadata
    manifest = read_manifest(config.checkpoint_dir)
    assert metadata["checkpoint/digest"].value == manifest.digest
    assert metadata["training/num_steps"].value == 5
    assert isinstance(metadata["eval/model/hr@10"], dg.FloatMetadataValue)
    assert metadata["pins"].value["train"] == config.train_pointers
    assert (materialization.tags or {})["dagster/data_version"] == manifest.digest
    kinds = [message["vlm"] for message in messages]
    assert kinds[0] == "progress"
    assert kinds[-2:] == ["trained", "evaluated"]


@pytest.mark.slow
def test_training_never_loads_dagster() -> None:
    code = (
        "import sys, vlm_dagster.training.session\n"
        "assert 'dagster' not in sys.modules, 'dagster was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_commands_choose_how_threads_wait_before_torch_loads() -> None:
    code = (
        "import sys, os, vlm_dagster.training.run as run, vlm_dagster.training.evaluate\n"
        "assert 'torch' not in sys.modules and 'OMP_WAIT_POLICY' not in os.environ\n"
        "run.main(['--config', 'none.json'])\n"
        "assert os.environ['OMP_WAIT_POLICY'] == 'passive'"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# -- the config ---------------------------------------------------------------------------------


def test_a_training_config_survives_json(config: TrainingConfig) -> None:
    again = TrainingConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config
    assert again.digest == config.digest
    assert replace(config, seed=1).digest != config.digest


def test_a_training_config_reads_exactly_what_the_model_needs(config: TrainingConfig) -> None:
    projection = config.projections["plays"]
    assert projection.traits == ("item_id", "available_at", "action")
    assert projection.max_length == 16
    assert config.model.label_head


def test_a_training_config_keeps_its_own_copy_of_the_pins() -> None:
    pins: dict[str, Any] = {"windows": ["a"]}
    config = TrainingConfig(train_pointers=pins, checkpoint_dir="out")
    pins["windows"].append("b")
    assert config.train_pointers == {"windows": ["a"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"max_seconds": -1.0}, "max_seconds=-1.0"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"eval_examples": "some"}, "eval_examples='some'"),
        ({"eval_top_k": ()}, "eval_top_k is empty"),
        ({"group": "no group"}, "no group"),
        ({"train_pointers": "latest"}, "'latest' is not a pin"),
        ({"checkpoint_dir": ""}, "checkpoint_dir is empty"),
        ({"model": HSTUConfig(traits=(CategoricalTrait("item_id", 2),))}, "item or the time"),
    ],
)
def test_a_bad_training_config_is_refused_with_its_value(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SchemaError, match=message):
        TrainingConfig(**{"train_pointers": {}, "checkpoint_dir": "out", **options})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"train_pointers": {}, "checkpoint_dir": "x", "lr": 1}, "'lr', which is unknown"),
        ({"checkpoint_dir": "x"}, "lacks 'train_pointers'"),
        ({"format_version": 9, "train_pointers": {}, "checkpoint_dir": "x"}, "format version 9"),
    ],
)
def test_a_config_file_that_does_not_fit_is_refused(value: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        TrainingConfig.from_json(value)
