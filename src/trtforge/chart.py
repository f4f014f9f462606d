"""Line charts as SVG, written by hand: a picture of figures that needs no plotting library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 860, 300
LEFT, RIGHT, TOP, BOTTOM = 70, 190, 40, 45  # room around the plot
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # also told apart by the colour-blind
MAX_POINTS = 800
NUM_TICKS = 5
STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True, slots=True)
class Series:
    """One line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over one pair of axes, both of which start at 0; `marks` are moments on the x axis.

    With `is_log_x` the x axis goes by powers of two instead, from the smallest x, which is above 0.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    marks: Sequence[float] = ()
    marks_name: str = ""
    is_log_x: bool = False


def write_svg(path: Path, charts: Sequence[Chart]) -> None:
    """Write the charts below each other."""
    size = f'width="{WIDTH}" height="{HEIGHT * len(charts)}"'
    style = 'font-family="sans-serif" font-size="12"'
    body = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>']
    body.append('<rect width="100%" height="100%" fill="white"/>')
    for index, chart in enumerate(charts):
        body.append(f'<g transform="translate(0 {index * HEIGHT})">')
        body += _draw(chart)
        body.append("</g>")
    body.append("</svg>")
    path.write_text("\n".join(body) + "\n")


def _draw(chart: Chart) -> list[str]:
    x_fraction, x_ticks = _log_axis(chart) if chart.is_log_x else _linear_axis(chart)
    y_step, y_max = _axis(max((max(s.y, default=0) for s in chart.series), default=0))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x_of(value: float) -> float:
        return LEFT + x_fraction(value) * (right - LEFT)

    def y_of(value: float) -> float:
        return bottom - value / y_max * (bottom - TOP)

    parts = [_text(LEFT, TOP - 15, chart.title, 'font-weight="bold"')]
    for value in _ticks(y_step, y_max):
        y = y_of(value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{value:g}", 'text-anchor="end"'))
    for value in x_ticks:
        parts.append(_text(x_of(value), bottom + 16, f"{value:g}", 'text-anchor="middle"'))
    parts.append(_text((LEFT + right) / 2, bottom + 35, chart.x_label, 'text-anchor="middle"'))
    middle = (TOP + bottom) / 2
    rotated = f'text-anchor="middle" transform="rotate(-90 16 {middle})"'
    parts.append(_text(16, middle, chart.y_label, rotated))
    for mark in chart.marks:
        parts.append(f'<path d="M{x_of(mark):.1f} {TOP}V{bottom}" stroke="#999" stroke-dasharray="3 3"/>')
    for index, series in enumerate(chart.series):
        color = COLORS[index % len(COLORS)]
        points = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in _thinned(series))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        parts += _legend(right + 12, TOP + 8 + 18 * index, series.name, f'stroke="{color}" stroke-width="3"')
    if chart.marks:
        y = TOP + 8 + 18 * len(chart.series)
        parts += _legend(right + 12, y, chart.marks_name, 'stroke="#999" stroke-dasharray="3 3"')
    return parts


def _legend(x: float, y: float, name: str, stroke: str) -> list[str]:
    return [f'<path d="M{x} {y}h18" {stroke}/>', _text(x + 24, y + 4, name)]


def _text(x: float, y: float, text: str, attributes: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{escape(text)}</text>'


def _linear_axis(chart: Chart) -> tuple[Callable[[float], float], list[float]]:
    """Where a value lies on the x axis, from 0 to 1, and the values that are named."""
    step, end = _axis(max((max(s.x, default=0) for s in chart.series), default=0))
    return lambda value: value / end, _ticks(step, end)


def _log_axis(chart: Chart) -> tuple[Callable[[float], float], list[float]]:
    """The same by powers of two."""
    values = [value for series in chart.series for value in series.x]
    low, high = min(values), max(values)
    ticks = [low * 2.0**power for power in range(int(math.log2(high / low)) + 1)]
    scale = math.log(high / low) or 1.0  # one value alone lies at the left end
    return lambda value: math.log(value / low) / scale, ticks


def _axis(highest: float) -> tuple[float, float]:
    """Distance of ticks and end of an axis that has round numbers."""
    if highest <= 0:
        return 1.0, 1.0
    magnitude = 1.0
    while magnitude * NUM_TICKS > highest:
        magnitude /= 10
    while magnitude * 10 * NUM_TICKS <= highest:
        magnitude *= 10
    step = next(magnitude * factor for factor in STEPS if magnitude * factor * NUM_TICKS >= highest)
    return step, step * NUM_TICKS


def _ticks(step: float, end: float) -> list[float]:
    return [step * index for index in range(round(end / step) + 1)]


def _thinned(series: Series) -> list[tuple[float, float]]:
    points = list(zip(series.x, series.y, strict=True))
    return points[:: max(1, len(points) // MAX_POINTS)]
