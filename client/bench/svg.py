"""Charts as SVG: axes, and marks drawn at values instead of pixels. Colours come from the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

WIDTH = 640.0
WIDE = 1240.0
HEIGHT = 280.0
# What a chart needs around its marks.
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 14.0, 12.0, 44.0
FRAME_HEIGHT = _TOP + _BOTTOM
_NUM_TICKS = 6
# A logarithmic axis over less than this has too few round numbers to be read.
_LEAST_LOG_RATIO = 8.0


@dataclass(frozen=True, slots=True)
class Axis:
    """A range of values; logarithmic if `is_log`, then `low` is above 0."""

    label: str
    low: float
    high: float
    is_log: bool = False

    @classmethod
    def from_zero(cls, label: str, values: Iterable[float]) -> Axis:
        """From 0 to the next round number above all values."""
        high = max(values, default=0.0) or 1.0
        step = _round_step(high / _NUM_TICKS)
        return cls(label, 0.0, math.ceil(high / step - 1e-9) * step)

    @classmethod
    def spread(cls, label: str, values: Iterable[float]) -> Axis:
        """Logarithmic if the values are positive and far apart, else from 0."""
        known = list(values)
        if known and min(known) > 0 and max(known) / min(known) >= _LEAST_LOG_RATIO:
            return cls(label, _round_down(min(known)), _round_step(max(known)), is_log=True)
        return cls.from_zero(label, known)

    def fraction(self, value: float) -> float:
        """Where the value lies, 0 at the low end and 1 at the high one; outside values at the ends."""
        value = min(max(value, self.low), self.high)
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round numbers within the range."""
        if not self.is_log:
            step = _round_step((self.high - self.low) / _NUM_TICKS)
            return [self.low + step * n for n in range(int((self.high - self.low) / step + 1e-9) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        digits = (1, 2, 5) if len(decades) <= 4 else (1,)
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
        return [tick for tick in ticks if self.low <= tick <= self.high]


def _round_step(least: float) -> float:
    """1, 2, 2.5 or 5 times a power of ten, at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(digit * power for digit in (1, 2, 2.5, 5, 10) if digit * power >= least * (1 - 1e-9))


def _round_down(most: float) -> float:
    """1, 2 or 5 times a power of ten, at most `most`."""
    power = 10.0 ** math.floor(math.log10(most))
    return next(digit * power for digit in (5, 2, 1) if digit * power <= most * (1 + 1e-9))


def format_tick(value: float) -> str:
    """As short as it can be."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.10g}"


class Chart:
    """One chart; marks are drawn in the order of the calls.

    `style` is a CSS class, `title` shows on hover.
    """

    def __init__(
        self,
        x: Axis,
        y: Axis,
        *,
        name: str,
        size: tuple[float, float] = (WIDTH, HEIGHT),
        has_y_ticks: bool = True,
    ) -> None:
        self._x, self._y = x, y
        self._name = name
        self._width, self._height = size
        self._has_y_ticks = has_y_ticks
        self._marks: list[str] = []

    def _at(self, point: Point) -> Point:
        x = _LEFT + self._x.fraction(point[0]) * (self._width - _LEFT - _RIGHT)
        y = self._height - _BOTTOM - self._y.fraction(point[1]) * (self._height - _TOP - _BOTTOM)
        return round(x, 1), round(y, 1)

    def line(self, points: Sequence[Point], style: str, *, area: bool = False) -> None:
        """A line through the points; `area` fills what is below it."""
        if not points:
            return
        pixels = [self._at(point) for point in points]
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in pixels)
        if area:
            bottom = self._height - _BOTTOM
            close = f"L{pixels[-1][0]:g} {bottom:g}L{pixels[0][0]:g} {bottom:g}Z"
            self._marks.append(f'<path class="area {style}" d="{path}{close}"/>')
        self._marks.append(f'<path class="line {style}" d="{path}"/>')

    def dot(self, point: Point, style: str, title: str, radius: float = 3) -> None:
        """A dot."""
        x, y = self._at(point)
        self._marks.append(
            f'<circle class="dot {style}" cx="{x:g}" cy="{y:g}" r="{radius:g}">{_title(title)}</circle>'
        )

    def text(self, point: Point, text: str) -> None:
        """A short text above and to the right of the point."""
        x, y = self._at(point)
        self._marks.append(f'<text class="note" x="{x + 6:g}" y="{y - 7:g}">{escape(text)}</text>')

    def box(self, corner: Point, opposite: Point, style: str, title: str) -> None:
        """A filled rectangle, at least half a pixel wide."""
        (x0, y0), (x1, y1) = self._at(corner), self._at(opposite)
        self._marks.append(
            f'<rect class="box {style}" x="{min(x0, x1):g}" y="{min(y0, y1):g}" '
            f'width="{max(abs(x1 - x0), 0.5):g}" height="{abs(y1 - y0):g}">{_title(title)}</rect>'
        )

    def level(self, y: float, text: str) -> None:
        """A dashed horizontal line with a text at its right end."""
        left, height = self._at((self._x.low, y))
        right = self._width - _RIGHT
        self._marks.append(
            f'<line class="level" x1="{left:g}" x2="{right:g}" y1="{height:g}" y2="{height:g}"/>'
            f'<text class="note" x="{right:g}" y="{height - 5:g}" text-anchor="end">{escape(text)}</text>'
        )

    def render(self) -> str:
        """The SVG element."""
        return "".join(
            [
                f'<svg viewBox="0 0 {self._width:g} {self._height:g}" role="img" ',
                f'aria-label="{escape(self._name)}">',
                *self._grid(),
                *self._marks,
                "</svg>",
            ]
        )

    def _grid(self) -> Iterable[str]:
        bottom, right = self._height - _BOTTOM, self._width - _RIGHT
        for tick in self._x.ticks():
            x = self._at((tick, self._y.low))[0]
            yield f'<line class="grid" x1="{x:g}" x2="{x:g}" y1="{_TOP:g}" y2="{bottom:g}"/>'
            yield f'<text x="{x:g}" y="{bottom + 16:g}" text-anchor="middle">{format_tick(tick)}</text>'
        for tick in self._y.ticks() if self._has_y_ticks else ():
            y = self._at((self._x.low, tick))[1]
            yield f'<line class="grid" x1="{_LEFT:g}" x2="{right:g}" y1="{y:g}" y2="{y:g}"/>'
            yield f'<text x="{_LEFT - 8:g}" y="{y + 4:g}" text-anchor="end">{format_tick(tick)}</text>'
        yield f'<line class="axis" x1="{_LEFT:g}" x2="{right:g}" y1="{bottom:g}" y2="{bottom:g}"/>'
        middle = (_LEFT + right) / 2
        yield (
            f'<text class="label" x="{middle:g}" y="{self._height - 8:g}" text-anchor="middle">'
            f"{escape(self._x.label)}</text>"
        )
        middle = (_TOP + bottom) / 2
        yield (
            f'<text class="label" transform="rotate(-90)" x="{-middle:g}" y="13" text-anchor="middle">'
            f"{escape(self._y.label)}</text>"
        )


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>"
