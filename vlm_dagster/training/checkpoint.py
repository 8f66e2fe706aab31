"""Checkpoints: weights and vocabulary as safetensors, everything else as JSON that names its pins.

A folder holds `checkpoint.json` and the weights file it names, whose own name is the start of its
SHA-256. The weights are put in place first and `checkpoint.json` is then replaced in one step, so
a crash leaves the old checkpoint or the new one, never a mixture. Nothing is ever unpickled.
`read_manifest` needs no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dagster.errors import CheckpointError, StorageError
from vlm_dagster.storage import redact

if TYPE_CHECKING:
    from vlm_dagster.models.hstu import HSTU
    from vlm_dagster.training.config import TrainingConfig
    from vlm_dagster.training.vocabulary import Vocabulary

__all__ = [
    "MANIFEST",
    "Checkpoint",
    "Manifest",
    "load_checkpoint",
    "read_manifest",
    "save_checkpoint",
    "write_json",
]

FORMAT_VERSION = 1
MANIFEST = "checkpoint.json"
_ARCHITECTURE = "hstu"


@dataclass(frozen=True)
class Manifest:
    """What `checkpoint.json` says.

    Attributes:
        digest: SHA-256 over the weights' digest and all the rest of the manifest.
        weights_file: name of the safetensors file beside the manifest.
        weights_digest: its SHA-256. Equal runs have equal weights digests, while `digest` also
            covers timings.
        num_items: V, the vocabulary's size.
        model_config: `HSTUConfig.to_json()`.
        training_config: `TrainingConfig.to_json()`.
        metrics: of training.
        pins: by role ("train", "eval"), the `PointerRef.to_json()`, which holds the pins of every
            history.
        environment: versions and device that made it.
    """

    digest: str
    weights_file: str
    weights_digest: str
    num_items: int
    model_config: Mapping[str, Any]
    training_config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    pins: Mapping[str, Any]
    environment: Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: the model is in evaluation mode, on the CPU."""

    model: HSTU
    vocabulary: Vocabulary
    manifest: Manifest


def _without_credentials(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {str(key): _without_credentials(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_credentials(item) for item in value]
    return value


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _put(path: Path, data: bytes) -> None:
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        raise StorageError(str(path), "writing a checkpoint", error) from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write strict JSON (no NaN) in one step, readable, credentials cut out of addresses."""
    text = json.dumps(_without_credentials(value), indent=2, allow_nan=False)
    _put(Path(path), f"{text}\n".encode())


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: HSTU,
    vocabulary: Vocabulary,
    config: TrainingConfig,
    *,
    metrics: Mapping[str, Any],
    environment: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write a checkpoint, replacing the folder's earlier one.

    Args:
        folder: made if missing.
        metrics: JSON values without NaN.
        environment: JSON values; versions and device.

    Raises:
        StorageError: the folder cannot be written. Its earlier checkpoint is untouched.
    """
    from safetensors.torch import save

    tensors = {f"model.{k}": v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    tensors["vocabulary.ids"] = vocabulary.ids.cpu().contiguous()
    tensors["vocabulary.counts"] = vocabulary.counts.cpu().contiguous()
    data = save(tensors)
    weights_digest = hashlib.sha256(data).hexdigest()
    body = _without_credentials(
        {
            "format_version": FORMAT_VERSION,
            "architecture": _ARCHITECTURE,
            "weights_file": f"model-{weights_digest[:16]}.safetensors",
            "weights_digest": weights_digest,
            "num_items": vocabulary.size,
            "model_config": model.config.to_json(),
            "training_config": config.to_json(),
            "metrics": metrics,
            "pins": {"train": config.train_pointers, "eval": config.eval_pointers},
            "environment": environment or {},
        }
    )
    manifest = {"digest": _digest(body), **body}
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(str(target), "making the checkpoint folder", error) from error
    _put(target / manifest["weights_file"], data)
    write_json(target / MANIFEST, manifest)
    for stale in target.glob("model-*.safetensors"):
        if stale.name != manifest["weights_file"]:
            stale.unlink(missing_ok=True)
    return _parse(target / MANIFEST, manifest)


def _parse(path: Path, value: Any) -> Manifest:
    if not isinstance(value, dict) or "format_version" not in value:
        raise CheckpointError(str(path), "it is not a checkpoint", "Name the folder of one.")
    if value["format_version"] != FORMAT_VERSION or value.get("architecture") != _ARCHITECTURE:
        raise CheckpointError(
            str(path),
            f"it has format version {value['format_version']!r} and architecture "
            f"{value.get('architecture')!r}",
            f"This code knows version {FORMAT_VERSION} of {_ARCHITECTURE!r}: upgrade the package.",
        )
    body = {key: item for key, item in value.items() if key != "digest"}
    if value.get("digest") != _digest(body):
        raise CheckpointError(
            str(path),
            f"its content has digest {_digest(body)}, but it says {value.get('digest')}",
            "It was edited or damaged: restore it from a copy, or train again.",
        )
    return Manifest(**{name: value[name] for name in Manifest.__dataclass_fields__})


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read and check `checkpoint.json`, without the weights and without torch.

    Raises:
        CheckpointError: no checkpoint is there, it is damaged, or newer than this code.
    """
    path = Path(folder) / MANIFEST
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            str(path), f"it cannot be read ({error})", "Name the folder of a finished training run."
        ) from None
    return _parse(path, value)


def load_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Load the model and its vocabulary, checking the weights against their digest.

    Raises:
        CheckpointError: as `read_manifest`; or the weights are missing or not what was written.
    """
    from safetensors.torch import load

    from vlm_dagster.models.config import HSTUConfig
    from vlm_dagster.models.hstu import HSTU
    from vlm_dagster.training.vocabulary import Vocabulary

    manifest = read_manifest(folder)
    path = Path(folder) / manifest.weights_file
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            str(path), f"the weights cannot be read ({error})", "Restore the file, or train again."
        ) from None
    found = hashlib.sha256(data).hexdigest()
    if found != manifest.weights_digest:
        raise CheckpointError(
            str(path),
            f"the weights have digest {found}, but were written with {manifest.weights_digest}",
            "Restore the file from a copy, or train again.",
        )
    tensors = load(data)
    vocabulary = Vocabulary(tensors.pop("vocabulary.ids"), tensors.pop("vocabulary.counts"))
    model = HSTU(HSTUConfig.from_json(dict(manifest.model_config)), manifest.num_items)
    model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items()})
    return Checkpoint(model.eval(), vocabulary, manifest)
