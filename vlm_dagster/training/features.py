"""From the loader's batch to what the model reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlm_dagster.errors import SchemaError
from vlm_dagster.models.inputs import ModelInputs
from vlm_dagster.training.config import TrainingConfig
from vlm_dagster.training.vocabulary import Vocabulary

if TYPE_CHECKING:
    from vlm_dagster.loaders import Batch

__all__ = ["to_model_inputs"]


def _labels(column: Tensor, name: str) -> Tensor:
    labels = column.to(torch.float32)
    bad = (labels != 0) & (labels != 1)
    if bool(bad.any()):
        raise SchemaError(
            f"label column {name!r} holds {column[bad][0].item()!r}",
            "Labels are binary: make the column 0 or 1 (or bool) where the pointers are built.",
        )
    return labels


def to_model_inputs(batch: Batch, vocabulary: Vocabulary, config: TrainingConfig) -> ModelInputs:
    """The columns that `config` names, items as vocabulary indices, on the batch's device.

    Raises:
        SchemaError: a column is missing, item ids are not integers, or a label is not binary.
    """
    examples, sequence = batch.examples, batch.sequences[config.group].expand()
    for name in (config.example_target, config.label_column):
        if name is not None and name not in examples:
            raise SchemaError(
                f"examples have no column {name!r}",
                f"They have {', '.join(sorted(examples))}: name one of them as target_column or "
                f"label_column, or add the column to the pointer dataset.",
            )
    values = sequence.values
    return ModelInputs(
        items=vocabulary.lookup(values[config.item_trait]),
        times_us=values[config.time_trait],
        offsets=sequence.offsets,
        query_time_us=examples["request_time"],
        traits={trait.name: values[trait.name] for trait in config.model.traits},
        targets=vocabulary.lookup(examples[config.example_target]),
        labels=(
            None
            if config.label_column is None
            else _labels(examples[config.label_column], config.label_column)
        ),
    )
