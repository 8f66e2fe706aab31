"""Telling people how a run goes: lines on stderr and, when Dagster launched it, Dagster itself.

Through Dagster Pipes a run sends, from rank 0 only: log lines as it goes; a custom message
`{"vlm": "progress" | "trained" | "evaluated", ...}` for each of these, which the launching asset
reads with `get_custom_messages()`; and at its end one materialization with all figures as metadata
and the checkpoint's digest as data version, which it reads with `get_materialize_result()`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dagster.training.checkpoint import Manifest
from vlm_dagster.training.world import World

if TYPE_CHECKING:
    from dagster_pipes import PipesContext

    from vlm_dagster.training.loop import StepReport, TrainingSummary

__all__ = ["Reporter", "open_reporter"]

_EVERY_S = 2.0  # a line of progress at most so often
_LOG_EVERY_S = 10.0  # and a log line to Dagster, which stores each one as an event


class Reporter:
    """Reports of one rank; silent on all ranks but the first."""

    def __init__(self, *, enabled: bool, pipes: PipesContext | None) -> None:
        self._enabled = enabled
        self._pipes = pipes
        self._line_at = self._logged_at = float("-inf")
        self._metadata: dict[str, Any] = {}
        self._digest: str | None = None

    def say(self, text: str, *, to_dagster: bool = True) -> None:
        """One line for a person."""
        if not self._enabled:
            return
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
        if self._pipes is not None and to_dagster:
            self._pipes.log.info(text)

    def _message(self, kind: str, values: Mapping[str, Any]) -> None:
        if self._pipes is not None:
            self._pipes.report_custom_message({"vlm": kind, **values})

    def step(self, report: StepReport) -> None:
        """Progress of training; drops reports that come too close together."""
        now = time.monotonic()
        if not self._enabled or now - self._line_at < _EVERY_S:
            return
        self._line_at = now
        # The launching asset draws its curve from these; Dagster does not store them.
        self._message(
            "progress", {name: getattr(report, name) for name in report.__dataclass_fields__}
        )
        to_dagster = now - self._logged_at >= _LOG_EVERY_S
        if to_dagster:
            self._logged_at = now
        label = "" if report.label_loss is None else f", label loss {report.label_loss:.4f}"
        self.say(
            f"step {report.step:,} (epoch {report.epoch}, {report.seconds:.0f} s): "
            f"next-item loss {report.next_item_loss:.4f}{label}",
            to_dagster=to_dagster,
        )

    def evaluating(self, num_examples: int) -> None:
        """Progress of evaluation, in examples this rank has read."""
        now = time.monotonic()
        if self._enabled and now - self._line_at >= _EVERY_S:
            self._line_at = now
            self.say(f"evaluating: {num_examples:,} examples read", to_dagster=False)

    def trained(self, summary: TrainingSummary, manifest: Manifest, folder: Path) -> None:
        """A checkpoint was written."""
        values = summary.to_json()
        self._message("trained", {**values, "checkpoint": str(folder), "digest": manifest.digest})
        self._digest = manifest.digest
        self._metadata |= {f"training/{k}": v for k, v in values.items() if v is not None}
        self._metadata |= {
            "checkpoint/path": {"raw_value": str(folder), "type": "path"},
            "checkpoint/digest": manifest.digest,
            "checkpoint/weights_digest": manifest.weights_digest,
            "checkpoint/num_items": manifest.num_items,
            "pins": {"raw_value": dict(manifest.pins), "type": "json"},
        }
        loss = "" if summary.next_item_loss is None else f", loss {summary.next_item_loss:.4f}"
        self.say(
            f"trained {summary.num_steps:,} steps on {summary.num_examples:,} examples in "
            f"{summary.seconds:.1f} s ({values['examples_per_second']:,.0f}/s, waited for data "
            f"{summary.data_wait_share:.0%} of it; stopped by {summary.stopped_by}){loss}; "
            f"checkpoint {manifest.digest[:12]} in {folder}"
        )

    def loaded(self, report: Mapping[str, Any]) -> None:
        """The stall report of this rank's loader."""
        flat = {k: v for k, v in report.items() if not isinstance(v, Mapping) and v is not None}
        self._metadata |= {f"loading/{name}": value for name, value in flat.items()}
        for name, value in report["data_ready_ms"].items():
            self._metadata[f"loading/data_ready_ms/{name}"] = value
        for stage, figures in report["stages"].items():
            self._metadata[f"loading/{stage}/busy_share"] = figures["busy_share"]
        for part in ("dropped", "uneven"):
            self._metadata[f"loading/{part}"] = {"raw_value": report[part], "type": "json"}
        self.say(report["sentence"])

    def evaluated(self, result: Mapping[str, Any], path: Path) -> None:
        """An evaluation was written."""
        self._message("evaluated", {**result, "path": str(path)})
        for kind in ("model", "popularity"):
            self._metadata |= {f"eval/{kind}/{k}": v for k, v in result[kind].items()}
        for name in ("num_examples", "num_evaluated", "num_unknown_targets"):
            self._metadata[f"eval/{name}"] = result[name]
        label = result["label"]
        if label is not None:
            self._metadata |= {"eval/ne": label["ne"], "eval/base_rate": label["base_rate"]}
        self._metadata["eval/path"] = {"raw_value": str(path), "type": "path"}
        parts = [
            f"{name} {_number(value)} (popularity {_number(result['popularity'][name])})"
            for name, value in result["model"].items()
        ]
        if label is not None:
            undefined = f" ({label['reason']})" if label["reason"] else ""
            parts.append(f"NE {_number(label['ne'])}{undefined}")
        self.say(
            f"evaluated {result['num_evaluated']:,} of {result['num_examples']:,} examples in "
            f"{result['seconds']:.1f} s: {', '.join(parts)}; {result['num_unknown_targets']:,} "
            f"targets unknown, counted as misses"
        )

    def finish(self) -> None:
        """Hand everything reported to Dagster as the asset's materialization."""
        if self._pipes is None or not self._metadata or not self._pipes.is_asset_step:
            return
        if len(self._pipes.asset_keys) == 1:
            self._pipes.report_asset_materialization(
                metadata=self._metadata, data_version=self._digest
            )


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


@contextlib.contextmanager
def open_reporter(world: World) -> Iterator[Reporter]:
    """The reporter of this rank. An exception inside is told to Dagster as it passes."""
    if world.rank != 0:
        yield Reporter(enabled=False, pipes=None)
    elif "DAGSTER_PIPES_CONTEXT" in os.environ:
        from dagster_pipes import open_dagster_pipes

        with open_dagster_pipes() as pipes:
            reporter = Reporter(enabled=True, pipes=pipes)
            yield reporter
            reporter.finish()
    else:
        yield Reporter(enabled=True, pipes=None)
