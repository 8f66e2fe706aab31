"""Events in: readers of what users have, made-up events, and the landing zone split by window."""

from vlm_dagster.events.generator_config import GeneratorConfig
from vlm_dagster.events.landed import LandedWindow
from vlm_dagster.events.landing import Landing, land
from vlm_dagster.events.opening import SourceFormat, open_source
from vlm_dagster.events.source import (
    BinaryLabel,
    EventSource,
    OnCutLine,
    Progress,
    content_ids,
    input_schema,
)

__all__ = [
    "BinaryLabel",
    "EventSource",
    "GeneratorConfig",
    "LandedWindow",
    "Landing",
    "OnCutLine",
    "Progress",
    "SourceFormat",
    "content_ids",
    "input_schema",
    "land",
    "open_source",
]

assert sorted(__all__) == __all__
