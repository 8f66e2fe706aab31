"""Small tables and pictures for the UI, as Markdown."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_dagster.pointers import PointerRef, PointerSnapshot
from vlm_dagster.storage import redact
from vlm_dagster.windows import format_us

__all__ = ["evaluation_table", "inputs_table", "loss_figure", "training_table", "windows_table"]

_WIDTH, _HEIGHT, _MARGIN = 640, 240, 48


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    lines += [" | ".join(str(cell) for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _number(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return "-" if value is None else str(value)
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def training_table(
    metrics: Mapping[str, Any], train: Sequence[str], snapshot: PointerSnapshot
) -> str:
    """What was trained on what, and how it went."""
    held = [s.window.key for s in snapshot.windows if s.window.key > train[-1]]
    rows: list[tuple[str, object]] = [
        ("trained on windows", f"{train[0]} to {train[-1]} ({len(train)})"),
        ("left for evaluation", f"{held[0]} to {held[-1]} ({len(held)})" if held else "none"),
    ]
    rows += [(name.replace("_", " "), _number(value)) for name, value in metrics.items()]
    return _table(["", ""], rows)


def evaluation_table(result: Mapping[str, Any]) -> str:
    """The model beside the popularity baseline."""
    model, popularity = result["model"], result["popularity"]
    rows = [
        (name.upper(), _number(value), _number(popularity.get(name)))
        for name, value in model.items()
    ]
    label = result.get("label")
    if label:
        rows.append(("NE (below 1 beats the base rate)", _number(label["ne"]), "1.0000"))
    return _table(["metric", "model", "popularity"], rows)


def inputs_table(pointers: PointerRef) -> str:
    """Every table that was read: address, version, how far, digest."""
    rows: list[tuple[object, ...]] = [
        (
            f"`{redact(pointers.uri)}`",
            pointers.version,
            f"{pointers.windows[0]} to {pointers.windows[-1]} ({len(pointers.windows)} windows)",
            f"`{pointers.digest[:16]}`",
        )
    ]
    for uri in sorted({pin.uri for pin in pointers.pins}):
        pins = sorted((p for p in pointers.pins if p.uri == uri), key=lambda p: p.version)
        mark = pins[-1].watermark_us
        versions = (
            str(pins[-1].version)
            if len(pins) == 1
            else f"{pins[0].version} to {pins[-1].version} ({len(pins)} pins)"
        )
        until = "-" if mark is None else f"complete up to {format_us(mark)}"
        rows.append((f"`{redact(uri)}`", versions, until, f"`{pins[-1].digest[:16]}`"))
    return _table(["table", "version", "span", "digest"], rows)


def windows_table(counts: Sequence[tuple[str, int]], most: int = 40) -> str:
    """Events of each window, the newest `most` windows."""
    shown = counts[-most:]
    top = max((num for _, num in shown), default=0) or 1
    rows = [(key, f"{num:,}", "█" * round(20 * num / top)) for key, num in shown]
    more = (
        f"\n\n{len(counts) - most:,} earlier windows are not shown." if len(counts) > most else ""
    )
    return _table(["window", "events", ""], rows) + more


def loss_figure(points: Sequence[tuple[int, float]]) -> str:
    """The loss over steps as an inline picture and a few of its values; "" without points."""
    if len(points) < 2:
        return ""
    picture = base64.b64encode(_svg(points).encode()).decode()
    shown = [points[round(i * (len(points) - 1) / 7)] for i in range(8)]
    few = list(dict.fromkeys(shown))
    table = _table(
        ["step", *(f"{step:,}" for step, _ in few)], [["loss", *(f"{v:.4f}" for _, v in few)]]
    )
    return f"![next-item loss by step](data:image/svg+xml;base64,{picture})\n\n{table}"


def _svg(points: Sequence[tuple[int, float]]) -> str:
    steps, losses = [p[0] for p in points], [p[1] for p in points]
    low, high = min(losses), max(losses)
    pad = (high - low) * 0.08 or 0.1
    low, high = low - pad, high + pad
    first, last = min(steps), max(steps)

    def place(step: float, loss: float) -> tuple[float, float]:
        x = _MARGIN + (step - first) / max(1, last - first) * (_WIDTH - _MARGIN - 12)
        y = 12 + (high - loss) / (high - low) * (_HEIGHT - _MARGIN - 12)
        return round(x, 1), round(y, 1)

    path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in points))
    marks = []
    for part in range(5):
        loss = low + (high - low) * part / 4
        _, y = place(first, loss)
        marks.append(
            f'<line x1="{_MARGIN}" x2="{_WIDTH - 12}" y1="{y}" y2="{y}" stroke="#8884"/>'
            f'<text x="{_MARGIN - 6}" y="{y + 4}" text-anchor="end">{loss:.2f}</text>'
        )
        step = first + (last - first) * part / 4
        x, _ = place(step, low)
        marks.append(
            f'<text x="{x}" y="{_HEIGHT - _MARGIN + 30}" text-anchor="middle">{step:,.0f}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'font-family="sans-serif" font-size="11" fill="#888">{"".join(marks)}'
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 2}" text-anchor="middle">step</text>'
        f'<polyline points="{path}" fill="none" stroke="#4f43dd" stroke-width="2"/></svg>'
    )
