"""Curves as SVG that stands inside an HTML page; colours and type come from the page's style sheet.

A chart's lines have the classes `s1`, `s2`, ... in the order of its series; axes `axis`, grid lines `grid`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 220  # units of the view box; the page decides about pixels
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 34  # around the plot
MANY = 40  # points from which on a running mean is drawn over the values themselves
TICKS = 4  # about so many on an axis

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line. points: (x, y), x ascending, all finite, at least one."""

    name: str
    points: Sequence[Point]


def line_chart(series: Sequence[Series], label: str, x_label: str) -> str:
    """An SVG element of all series on common axes. label: what screen readers say. ValueError without a point."""
    every = [point for line in series for point in line.points]
    if not every or not all(math.isfinite(value) for point in every for value in point):
        raise ValueError(f"nothing to draw as {label!r}: {len(every)} points, wanted at least one, all finite")
    x_ticks = ticks(min(x for x, _ in every), max(x for x, _ in every))
    y_ticks = ticks(min(y for _, y in every), max(y for _, y in every))

    def place(point: Point) -> Point:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (point[0] - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        y = HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (point[1] - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(x, 1), round(y, 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for value in y_ticks:
        x, y = place((x_ticks[0], value))
        parts.append(f'<line class="grid" x1="{x}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="axis" x="{x - 6}" y="{y + 4}" text-anchor="end">{number(value)}</text>')
    for value in x_ticks:
        x, y = place((value, y_ticks[0]))
        parts.append(f'<text class="axis" x="{x}" y="{y + 15}" text-anchor="middle">{number(value)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 3}" text-anchor="middle">{escape(x_label)}</text>')
    for index, line in enumerate(series, 1):
        parts += _line(line, index, place)
    return "".join([*parts, "</svg>"])


def _line(line: Series, index: int, place: Callable[[Point], Point]) -> list[str]:
    """The elements of one series: dots where there are few points, else the values pale below their running mean."""
    placed = [place(point) for point in line.points]
    if len(placed) > MANY:
        mean = [place(point) for point in running_mean(line.points, len(placed) // 20)]
        return [_path(placed, f"s{index} pale"), _path(mean, f"s{index}")]
    dots = [
        f'<circle class="s{index}" cx="{x}" cy="{y}" r="3.5"><title>{escape(line.name)}: {point[1]:.4g} at '
        f"{number(point[0])}</title></circle>"
        for (x, y), point in zip(placed, line.points, strict=True)
    ]
    return [_path(placed, f"s{index}"), *dots]


def _path(points: Sequence[Point], style: str) -> str:
    return f'<polyline class="{style}" points="{" ".join(f"{x},{y}" for x, y in points)}"/>'


def ticks(low: float, high: float) -> list[float]:
    """About TICKS round numbers from at most `low` to at least `high`; two at least."""
    span = high - low or abs(high) or 1.0
    rough = span / TICKS
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(magnitude * factor for factor in (1, 2, 5, 10) if magnitude * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def running_mean(points: Sequence[Point], reach: int) -> list[Point]:
    """Each y as the mean of itself and of `reach` neighbours to either side, fewer at the ends."""
    values = [y for _, y in points]
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [(x, sum(window) / len(window)) for (x, _), window in zip(points, windows, strict=True)]


def number(value: float) -> str:
    """A tick's label: 0.3, 1200, 1.5e-05."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) > 1e-12 else "0"
