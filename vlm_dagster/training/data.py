"""Where a run's items and batches come from: the pinned pointers that its config names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from vlm_dagster.errors import TrainingError
from vlm_dagster.pointers import PointerRef
from vlm_dagster.schema import TIME_TYPE
from vlm_dagster.training.config import TrainingConfig
from vlm_dagster.training.vocabulary import Vocabulary, build_vocabulary
from vlm_dagster.training.world import World

if TYPE_CHECKING:
    from vlm_dagster.loaders import SequenceLoader

__all__ = ["open_loader", "train_vocabulary", "training_items"]


def training_items(config: TrainingConfig) -> Iterator[pa.Array]:
    """Item ids of every event that was available before the last training window ended.

    The pinned history may go on beyond that; later events are left out, because neither the
    vocabulary nor the popularity baseline may know what evaluation is about to ask.
    """
    ref = PointerRef.from_json(config.train_pointers)
    pins = [pin for pin in ref.pins if pin.group == config.group]
    if not pins:
        raise TrainingError(
            f"the training pointers have no history of group {config.group!r}",
            f"They point into {', '.join(sorted({p.group for p in ref.pins})) or 'none'}: set group.",
        )
    end_us = ref.open().windows[-1].window.end_us
    newest = max(pins, key=lambda pin: (pin.watermark_us or 0, pin.version))
    snapshot = newest.open()
    items = snapshot.column_chunks(config.item_trait)
    if newest.watermark_us is None or newest.watermark_us <= end_us:
        yield from items
        return
    end = pa.scalar(end_us, TIME_TYPE)
    for chunk, times in zip(items, snapshot.column_chunks("available_at"), strict=True):
        yield chunk.filter(pc.less(times, end))


def train_vocabulary(config: TrainingConfig) -> Vocabulary:
    """The vocabulary of the training windows, with how often each item occurred there."""
    return build_vocabulary(
        training_items(config),
        min_count=config.vocabulary_min_count,
        max_size=config.vocabulary_max_size,
    )


def open_loader(
    pointers: Mapping[str, Any], config: TrainingConfig, world: World, *, shuffle: bool
) -> SequenceLoader:
    """The loader of this rank's share: shuffled training batches, or ordered evaluation batches."""
    from vlm_dagster.loaders import SequenceLoader

    return SequenceLoader(
        PointerRef.from_json(pointers),
        config.projections,
        batch_size=config.batch_size if shuffle else config.eval_batch_size,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        order="shuffled" if shuffle else "stored",
        workers=config.workers,
        num_workers=config.num_workers,
        prefetch=config.prefetch,
        mix=config.mix,
        lanes=config.lanes if shuffle else world.size,
        verify=config.verify,
        cache=config.cache,
        gone=config.gone,
        uneven="keep",  # every example exactly once; the training loop copes with unequal ranks
        pin_memory=world.device.type == "cuda",
    )
