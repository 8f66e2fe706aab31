"""Made-up interactions that look like people's: seeded, of any size, streamed.

What is in them for a model to find:

- **activity** is heavy-tailed over users, and a declared share has very long histories;
- **sessions**: bursts with pauses, in each user's own part of the day, more of them at weekends;
- **tastes**: a user has a fast, a medium and a slow interest, each a topic that is replaced after a
  quarter of, once, and four times `drift_days`; a session is about one of them. The last few
  events show one interest, a long history shows all of them;
- **items**: inside a topic popularity follows Zipf's law; 45 % of events go on to the item that
  always follows the previous one; a quarter or so return to the user's own favourites;
- **actions** and **dwell** depend on how well the item matches the user, so the label does too;
- **late arrivals**: some sessions become available hours to days later, all events at once, as
  from a phone that was offline.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm_dagster.errors import TableError
from vlm_dagster.events.columns import ColumnMapping
from vlm_dagster.events.directories import alone, building, put_in_place
from vlm_dagster.events.generator_config import GeneratorConfig
from vlm_dagster.events.interactions import Interactions
from vlm_dagster.events.source import BinaryLabel, Progress, input_schema
from vlm_dagster.events.tables import ParquetSource
from vlm_dagster.schema import FeatureGroup, Trait

__all__ = ["ACTIONS", "INTERACTIONS", "GeneratorConfig", "generate", "open_generated", "write"]

ACTIONS = {"view": 0, "like": 1, "share": 2, "buy": 3}
"""The codes of trait `action`. The label is 1 for anything beyond a view."""

INTERACTIONS = FeatureGroup(
    "interactions",
    [
        Trait("item_id", pa.int64()),
        Trait("author_id", pa.int64()),
        Trait("category", pa.int16()),
        Trait("action", pa.int8()),
        Trait("dwell_seconds", pa.float32()),
    ],
    availability="recorded",
)

_VERSION = 1
_MANIFEST = "generated.json"
_BYTES_PER_EVENT = 59  # of the columns in memory


class GeneratedEvents:
    """Made-up events as a source: day by day of availability, nothing stored.

    Attributes:
        expected_num_events: the true number differs from it by a few per cent.
    """

    group = INTERACTIONS
    label = BinaryLabel("action", at_least=1)
    paths: tuple[str, ...] = ()
    num_dropped = 0

    def __init__(self, config: GeneratorConfig) -> None:
        self.config = config
        self._people = Interactions(config)
        self.expected_num_events = int(self._people.expected_per_day * config.num_days)
        self.num_bytes = self.expected_num_events * _BYTES_PER_EVENT

    def options(self) -> dict[str, Any]:
        return {"format": "generated", "version": _VERSION, "config": self.config.to_json()}

    def days(self) -> Iterator[Iterator[pa.RecordBatch]]:
        """For each day of availability its events: first what comes late from earlier days, then
        user by user. Each day's iterator must be used up before the next one is asked for."""
        pending: dict[int, list[pa.RecordBatch]] = {}
        for day in range(self.config.num_days):
            yield self._day(day, pending)

    def _day(self, day: int, pending: dict[int, list[pa.RecordBatch]]) -> Iterator[pa.RecordBatch]:
        yield from pending.pop(day, [])
        schema = input_schema(self.group)
        for chunk in range(self._people.num_chunks):
            columns = self._people.events(day, chunk)
            batch = pa.record_batch([pa.array(c) for c in columns], names=schema.names)
            batch = batch.cast(schema)
            available = (columns[3] - self.config.start_us) // 86_400_000_000
            later = np.flatnonzero(available != day)
            if len(later) == 0:
                yield batch
                continue
            yield batch.filter(pa.array(available == day))
            for when in np.unique(available[later]).tolist():
                if when < self.config.num_days:
                    rows = later[available[later] == when]
                    pending.setdefault(when, []).append(batch.take(pa.array(rows)))

    def batches(self, progress: Progress | None = None) -> Iterator[pa.RecordBatch]:
        num_done = 0
        for day in self.days():
            for batch in day:
                yield batch
                num_done += batch.num_rows
                if progress is not None:
                    progress(min(num_done * _BYTES_PER_EVENT, self.num_bytes))
        if progress is not None:
            progress(self.num_bytes)


class GeneratedFiles(ParquetSource):
    """A folder that `write` made, as a source: the same events in the same order."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        super().__init__(
            [folder / name for name in manifest["files"]], ColumnMapping(group=INTERACTIONS.name)
        )
        self.group = INTERACTIONS
        self.label = BinaryLabel("action", at_least=1)
        self.num_events: int = manifest["num_events"]
        self.config = GeneratorConfig(**manifest["config"])

    def options(self) -> dict[str, Any]:
        return {"format": "generated", "version": _VERSION, "config": self.config.to_json()}


def generate(config: GeneratorConfig) -> GeneratedEvents:
    """The events of a config as a source, made while they are read."""
    return GeneratedEvents(config)


def write(
    config: GeneratorConfig,
    directory: str | os.PathLike[str],
    progress: Progress | None = None,
) -> GeneratedFiles:
    """Make events into a folder: one Parquet file a day of availability, and `generated.json`.

    The folder appears whole or not at all; one with the same config is reused.

    Raises:
        TableError: the folder holds something else. It was left alone.
        StorageError: the disk refused. Nothing is left behind.
    """
    target = Path(directory).absolute()
    if target.exists() and (target.is_file() or any(target.iterdir())):
        found = open_generated(target)
        if found.config == config:
            return found
        raise TableError(
            str(target), "holds events generated with other values",
            "Give another folder, or delete this one.",
        )  # fmt: skip
    source = generate(config)
    start = date.fromisoformat(config.start).toordinal()
    files = []
    num_events = 0
    with building(target) as folder:
        for number, day in enumerate(source.days()):
            name = f"events-{date.fromordinal(start + number)}.parquet"
            files.append(name)
            with pq.ParquetWriter(
                folder / name, input_schema(source.group), compression="lz4", use_dictionary=False
            ) as writer:
                for batch in day:
                    writer.write_batch(batch)
                    num_events += batch.num_rows
                    if progress is not None:
                        progress(min(num_events * _BYTES_PER_EVENT, source.num_bytes))
        manifest = {
            "format": "vlm-dagster generated events",
            "version": _VERSION,
            "config": config.to_json(),
            "num_events": num_events,
            "files": files,
        }
        (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        with alone(target):
            put_in_place(folder, target)
    if progress is not None:
        progress(source.num_bytes)
    return GeneratedFiles(target, manifest)


def open_generated(directory: str | os.PathLike[str]) -> GeneratedFiles:
    """Open a folder that `write` made.

    Raises:
        TableError: there is none, it is not one of ours, or another release made it.
    """
    folder = Path(directory).absolute()
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
    except (OSError, ValueError):
        manifest = {}
    if manifest.get("format") != "vlm-dagster generated events":
        raise TableError(
            str(folder), f"is not a folder of generated events (no {_MANIFEST} of ours)",
            "Make one with `vlm-dagster generate`, or give another folder.",
        )  # fmt: skip
    if manifest.get("version") != _VERSION:
        raise TableError(
            str(folder), f"was generated by another release (version {manifest.get('version')!r}; "
            f"this one reads {_VERSION})", "Generate it again.",
        )  # fmt: skip
    return GeneratedFiles(folder, manifest)
