"""Small line plots as SVG, written by hand: panels side by side that share their x axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Line", "Panel", "svg"]

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 280, 190, 52, 46, 30
_COLOURS = ("#1f6feb", "#d1570a", "#2da44e", "#8250df")
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#57606a}"
    ".title{font-size:13px;font-weight:600}"
    ".grid{stroke:#8c959f;stroke-opacity:.3}"
    ".line{fill:none;stroke-width:2}"
)


@dataclass(frozen=True)
class Line:
    """How a line looks: the number of its colour, and whether it is dashed."""

    colour: int
    dashed: bool = False

    @property
    def stroke(self) -> str:
        dashes = ' stroke-dasharray="5 4"' if self.dashed else ""
        return f'stroke="{_COLOURS[self.colour]}"{dashes}'


@dataclass(frozen=True)
class Panel:
    """One plot: for each label of the x axis, a value of each line; the y axis begins at 0."""

    title: str
    lines: Mapping[str, Sequence[float]]
    top: float | None = None


def svg(xs: Sequence[str], x_title: str, lines: Mapping[str, Line], panels: Sequence[Panel]) -> str:
    """The panels as one SVG document; x positions are evenly spaced.

    Args:
        lines: the legend: all lines that panels name.
    """
    step = _WIDTH + _LEFT + _GAP
    body = [
        _panel(panel, xs, x_title, lines, _LEFT + number * step)
        for number, panel in enumerate(panels)
    ]
    bottom = _TOP + _HEIGHT + 70
    at = _LEFT
    for name, line in lines.items():
        across = f'x1="{at}" x2="{at + 24}" y1="{bottom - 7}" y2="{bottom - 7}"'
        body.append(f'<line class="line" {across} {line.stroke}/>')
        body.append(_text(at + 30, bottom - 3, name))
        at += 56 + 7 * len(name)
    size = f'width="{step * len(panels)}" height="{bottom + 14}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{_STYLE}</style>'
        + "".join(body)
        + "</svg>\n"
    )


def _panel(
    panel: Panel, xs: Sequence[str], x_title: str, lines: Mapping[str, Line], left: int
) -> str:
    top = panel.top or _round_up(max(max(values) for values in panel.lines.values()))
    bottom = _TOP + _HEIGHT

    def x(number: int) -> float:
        return left + 14 + number * (_WIDTH - 28) / max(len(xs) - 1, 1)

    def y(value: float) -> float:
        return bottom - _HEIGHT * value / top

    parts = [_text(left, _TOP - 18, panel.title, "title")]
    for tick in range(5):
        value = top * tick / 4
        at = y(value)
        parts.append(
            f'<line class="grid" x1="{left}" x2="{left + _WIDTH}" y1="{at:.1f}" y2="{at:.1f}"/>'
        )
        parts.append(_text(left - 8, at + 4, f"{value:g}", anchor="end"))
    for number, label in enumerate(xs):
        parts.append(_text(x(number), bottom + 18, label, anchor="middle"))
    parts.append(_text(left + _WIDTH / 2, bottom + 38, x_title, anchor="middle"))
    for name, values in panel.lines.items():
        places = [(x(i), y(value)) for i, value in enumerate(values)]
        points = " ".join(f"{across:.1f},{down:.1f}" for across, down in places)
        parts.append(f'<polyline class="line" {lines[name].stroke} points="{points}"/>')
        parts += [
            f'<circle cx="{across:.1f}" cy="{down:.1f}" r="3" fill="{_COLOURS[lines[name].colour]}"/>'
            for across, down in places
        ]
    return "".join(parts)


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    named = f' class="{style}"' if style else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 6, 8 times a power of ten."""
    power = 1.0
    while power * 10 <= value:
        power *= 10
    while power > value:
        power /= 10
    return next(step * power for step in (1, 2, 4, 6, 8, 10) if step * power >= value)
