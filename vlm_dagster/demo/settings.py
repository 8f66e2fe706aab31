"""What the demonstration runs on: kept in VLM_HOME/demo.json, read by the code location."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from vlm_dagster.errors import SchemaError
from vlm_dagster.events import BinaryLabel, EventSource, GeneratorConfig, open_source
from vlm_dagster.events.generate import generate
from vlm_dagster.schema import FeatureGroup
from vlm_dagster.windows import Cadence, WindowGrid

__all__ = ["DemoSettings", "default_settings", "home_folder"]

FORMAT_VERSION = 1
SETTINGS = "demo.json"


def home_folder() -> Path:
    """VLM_HOME, or `.vlm` where the process was started."""
    return Path(os.environ.get("VLM_HOME", ".vlm")).absolute()


@dataclass(frozen=True)
class DemoSettings:
    """One data set and what to do with it.

    Attributes:
        source: where events come from: {"format": "movielens", "path": ...} and further arguments of
            `open_source`, or {"format": "made up", "config": ...} for a `GeneratorConfig`.
        group: what the events are.
        label: how a binary label follows from an event; None if there is none.
        cadence: the length of a window.
        first_window, end_window: keys of the first window, and of the one after the last.
        item_trait: the trait that holds the item.
        num_buckets: of the histories and the pointers.
        max_length: the newest so many events that a pointer spans; None means all.
        eval_share: the newest windows with at least this share of the examples are held out.
        num_processes: ranks of the training run.
        training: further options of `TrainingConfig`, as JSON values.
    """

    source: dict[str, Any]
    group: FeatureGroup
    label: BinaryLabel | None
    cadence: Cadence
    first_window: str
    end_window: str
    item_trait: str = "item_id"
    num_buckets: int = 4
    max_length: int | None = None
    eval_share: float = 0.1
    num_processes: int = 1
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        grid = WindowGrid(self.cadence)
        first, end = grid.parse(self.first_window), grid.parse(self.end_window)
        if end <= first:
            raise SchemaError(
                f"end_window={end.key!r} is not after first_window={first.key!r}",
                "Name the window after the last one.",
            )
        self.group.trait(self.item_trait)

    @property
    def num_windows(self) -> int:
        grid = WindowGrid(self.cadence)
        return grid.parse(self.end_window).index - grid.parse(self.first_window).index

    def open_source(self) -> EventSource:
        """The events.

        Raises:
            SourceFormatError: the input is missing or not of its format.
        """
        options = dict(self.source)
        if options.pop("format") == "made up":
            return generate(GeneratorConfig(**options["config"]))
        return open_source(**self.source)

    def to_json(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["group"] = self.group.to_json()
        values["label"] = None if self.label is None else self.label.to_json()
        return {"format_version": FORMAT_VERSION, **values}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> DemoSettings:
        values = dict(value)
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise SchemaError(
                f"the demo's settings have format version {version!r}",
                f"This code knows version {FORMAT_VERSION}: run the demo again.",
            )
        label = values["label"]
        values["group"] = FeatureGroup.from_json(values["group"])
        values["label"] = None if label is None else BinaryLabel(**label)
        return cls(**values)

    def save(self, home: Path) -> None:
        """Write them into a home folder, in one step."""
        home.mkdir(parents=True, exist_ok=True)
        scratch = home / f".{SETTINGS}.{os.getpid()}"
        scratch.write_text(json.dumps(self.to_json(), indent=2) + "\n", "utf-8")
        scratch.replace(home / SETTINGS)

    @classmethod
    def load(cls, home: Path) -> DemoSettings:
        """Those of a home folder; `default_settings()` where it has none.

        Raises:
            SchemaError: the file is damaged or of another release.
        """
        path = home / SETTINGS
        try:
            text = path.read_text("utf-8")
        except FileNotFoundError:
            return default_settings()
        try:
            return cls.from_json(json.loads(text))
        except (ValueError, KeyError, TypeError) as error:
            raise SchemaError(
                f"{path} is not the demo's settings ({error})",
                "Delete it, or run the demo again.",
            ) from None


def default_settings(config: GeneratorConfig | None = None) -> DemoSettings:
    """Made-up events of a month (or of a config), daily."""
    config = config or GeneratorConfig()
    grid = WindowGrid("daily")
    first = grid.containing(config.start_us)
    made = generate(config)
    return DemoSettings(
        source={"format": "made up", "config": asdict(config)},
        group=made.group,
        label=made.label,
        cadence="daily",
        first_window=first.key,
        end_window=grid.at(first.index + config.num_days).key,
    )
