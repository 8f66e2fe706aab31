"""Checkpoints: whole or not there, bound to their pins, free of credentials, never unpickled."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_dagster.errors import CheckpointError, StorageError
from vlm_dagster.models import HSTU, CategoricalTrait, HSTUConfig
from vlm_dagster.training import checkpoint as checkpoint_module
from vlm_dagster.training.checkpoint import (
    MANIFEST,
    Manifest,
    load_checkpoint,
    read_manifest,
    save_checkpoint,
    write_json,
)
from vlm_dagster.training.config import TrainingConfig
from vlm_dagster.training.vocabulary import Vocabulary

PIN = {
    "uri": "s3://key:secret@bucket/ratings?token=hush#part",
    "table_id": "t",
    "group": "ratings",
    "version": 7,
    "watermark_us": 10**15,
    "digest": "d7",
}
POINTERS = {
    "uri": "s3://me:secret@bucket/pointers?X-Amz-Signature=hush",
    "table_id": "p",
    "version": 3,
    "windows": ["1997-09-20"],
    "digest": "d3",
    "pins": [PIN],
}
VOCABULARY = Vocabulary(torch.tensor([70, 10, 40]), torch.tensor([2, 9, 5, 5]))
CONFIG = TrainingConfig(
    train_pointers=POINTERS,
    checkpoint_dir="out",
    label_column="liked",
    model=HSTUConfig(
        max_length=4, dim=8, num_layers=1, num_heads=2, traits=(CategoricalTrait("action", 3),)
    ),
)


def make_model(seed: int = 0) -> HSTU:
    torch.manual_seed(seed)
    return HSTU(CONFIG.model, VOCABULARY.size)


def save(folder: Path, seed: int = 0, **options: Any) -> Manifest:
    metrics = options.pop("metrics", {"next_item_loss": 1.5})
    return save_checkpoint(folder, make_model(seed), VOCABULARY, CONFIG, metrics=metrics, **options)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    saved = save(tmp_path / "deep" / "folder", environment={"torch": "2"})
    loaded = load_checkpoint(tmp_path / "deep" / "folder")
    assert loaded.manifest == saved
    assert loaded.vocabulary == VOCABULARY
    assert loaded.model.config == CONFIG.model
    assert not loaded.model.training
    for name, tensor in make_model().state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    assert TrainingConfig.from_json(saved.training_config).model == CONFIG.model
    assert saved.metrics == {"next_item_loss": 1.5}
    assert saved.environment == {"torch": "2"}


def test_the_manifest_names_every_pin_and_no_credential(tmp_path: Path) -> None:
    pins = save(tmp_path).pins
    assert pins["eval"] is None
    assert pins["train"]["uri"] == "s3://bucket/pointers"
    assert pins["train"]["pins"][0] == {**PIN, "uri": "s3://bucket/ratings"}
    for path in tmp_path.iterdir():
        content = path.read_bytes()
        for secret in (b"secret", b"hush", b"key:", b"Signature"):
            assert secret not in content, path


def test_equal_content_has_equal_digests(tmp_path: Path) -> None:
    one, same = save(tmp_path / "a"), save(tmp_path / "b")
    assert (one.digest, one.weights_digest) == (same.digest, same.weights_digest)
    assert (tmp_path / "a" / MANIFEST).read_bytes() == (tmp_path / "b" / MANIFEST).read_bytes()
    other_metrics = save(tmp_path / "c", metrics={"next_item_loss": 1.4})
    assert other_metrics.weights_digest == one.weights_digest
    assert other_metrics.digest != one.digest
    assert save(tmp_path / "d", seed=1).weights_digest != one.weights_digest


def test_a_new_checkpoint_replaces_the_old_one(tmp_path: Path) -> None:
    old = save(tmp_path)
    new = save(tmp_path, seed=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [MANIFEST, new.weights_file]
    assert new.weights_file != old.weights_file
    assert load_checkpoint(tmp_path).manifest == new


@pytest.mark.parametrize("failing", [1, 2])
def test_a_crash_while_writing_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    old = save(tmp_path)
    calls = 0
    fsync = checkpoint_module.os.fsync

    def full_disk(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(checkpoint_module.os, "fsync", full_disk)
    with pytest.raises(StorageError, match="No space left on device"):
        save(tmp_path, seed=1)
    assert load_checkpoint(tmp_path).manifest == old
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp"))


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / save(tmp_path).weights_file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="the weights have digest"):
        load_checkpoint(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="the weights cannot be read"):
        load_checkpoint(tmp_path)


def test_a_pickle_in_place_of_the_weights_is_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "exploded",)

    path = tmp_path / save(tmp_path).weights_file
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    edit(tmp_path, metrics={"next_item_loss": 0.1})
    with pytest.raises(CheckpointError, match="edited or damaged"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("changes", [{"format_version": 2}, {"architecture": "sasrec"}])
def test_a_newer_format_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    save(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(CheckpointError, match="upgrade the package"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"{}", b"\xff"])
def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint\.json"):
        read_manifest(tmp_path)


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="making the checkpoint folder"):
        save(tmp_path / "file" / "folder")


def test_json_that_is_written_is_strict(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"ne": float("nan")})
    assert not list(tmp_path.iterdir())
