"""The IO manager of checkpoints: a folder a run, and a note of which one an asset holds."""

from __future__ import annotations

import json
from pathlib import Path

import dagster as dg
from pydantic import Field

from vlm_dagster.errors import CheckpointError, SchemaError
from vlm_dagster.io_managers.base import DescribedIOManager
from vlm_dagster.io_managers.failures import told_to_dagster
from vlm_dagster.io_managers.handles import CheckpointRef
from vlm_dagster.training.checkpoint import read_manifest, write_json

__all__ = ["VlmCheckpointIOManager"]

_CURRENT = "current.json"


class VlmCheckpointIOManager(DescribedIOManager):
    """Keeps every run's checkpoint in `ROOT/ASSET/RUN_ID` and remembers which one the asset holds.

    An asset returns a `CheckpointRef` of the folder that its training process wrote; downstream gets
    that ref. What it loads is checked: a checkpoint that is not the one noted is refused.
    """

    root: str = Field(
        description=(
            "Local or mounted folder for checkpoints. A relative one counts from where Dagster was "
            "started."
        ),
    )

    def folder(self, asset_key: dg.AssetKey, run_id: str) -> Path:
        """Where a run's checkpoint of an asset belongs."""
        return self._home(asset_key) / run_id

    def _home(self, asset_key: dg.AssetKey) -> Path:
        return Path(self.root).absolute().joinpath(*asset_key.path)

    def handle_output(self, context: dg.OutputContext, obj: object) -> None:
        with told_to_dagster():
            if not isinstance(obj, CheckpointRef):
                raise SchemaError(
                    f"the checkpoint IO manager got a {type(obj).__name__}",
                    "Return a CheckpointRef, as training_asset does.",
                )
            check_unchanged(obj)
            home = self._home(context.asset_key)
            home.mkdir(parents=True, exist_ok=True)
            write_json(home / _CURRENT, obj.to_json())
        context.add_output_metadata({"dagster/uri": obj.folder, "digest": obj.digest})

    def load_input(self, context: dg.InputContext) -> CheckpointRef:
        note = self._home(context.asset_key) / _CURRENT
        with told_to_dagster():
            try:
                ref = CheckpointRef.from_json(json.loads(note.read_text("utf-8")))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    str(note),
                    f"it cannot be read ({error})",
                    "Materialize the training asset first.",
                ) from None
            check_unchanged(ref)
            return ref


def check_unchanged(ref: CheckpointRef) -> None:
    """CheckpointError unless the checkpoint that a ref names is still there, as it was."""
    found = read_manifest(ref.folder)
    if found.digest != ref.digest:
        raise CheckpointError(
            ref.folder,
            f"its digest is {found.digest}, but {ref.digest} was noted",
            "Another checkpoint was written over it: train again, or restore it from a copy.",
        )
