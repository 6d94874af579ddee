"""Rank 0: charts as plain values, and as inline SVG. All text is escaped; colours come from the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

# Of an SVG, in its own units: about as wide as a phone, so that its text is as large there as elsewhere.
WIDTH, HEIGHT = 400, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 12, 14, 34
# As many as the page's CSS has colours.
COLOURS = 6


@dataclass(frozen=True)
class Series:
    """A line: points `(x, y)` and, where known, the standard error of each."""

    name: str
    points: tuple[tuple[float, float], ...]
    errors: tuple[float, ...] = ()


@dataclass(frozen=True)
class LineChart:
    """Lines over a common x axis.

    Attributes:
        key: name of its file and its anchor.
        title: what is shown, with its unit.
        x_label: of the x axis.
        series: the lines.
        boundaries: x and name of what begins there.
        level: a horizontal line to compare with.
        ticks: x -> label where the x axis has names instead of numbers.
        note: a sentence below.
    """

    key: str
    title: str
    x_label: str
    series: tuple[Series, ...]
    boundaries: tuple[tuple[float, str], ...] = ()
    level: float | None = None
    ticks: dict[float, str] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class BarChart:
    """Horizontal bars from 0, with error bars.

    Attributes:
        key: name of its file and its anchor.
        title: what is shown, with its unit.
        bars: name, value and standard error (0 where unknown).
        top: right end of the axis; None is the largest value.
        level: a vertical line to compare with.
        note: a sentence below.
    """

    key: str
    title: str
    bars: tuple[tuple[str, float, float], ...]
    top: float | None = None
    level: float | None = None
    note: str = ""


Chart = LineChart | BarChart
# x and y of the data -> those of the SVG.
Place = Callable[[float, float], tuple[float, float]]


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [(first + i) * step for i in range(int(math.floor(high / step + 1e-9)) - first + 1)]


def number(value: float) -> str:
    """Short: 3 significant digits, k and M for thousands and millions."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}" if value else "0"


def shortened(text: str, length: int) -> str:
    """At most `length` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


def svg(chart: Chart) -> str:
    """The chart as one `<svg>` element."""
    height, body = _lines(chart) if isinstance(chart, LineChart) else _bars(chart)
    label = escape(chart.title, quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{body}</svg>'


def _text(x: float, y: float, text: str, css: str = "", anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _lines(chart: LineChart) -> tuple[int, str]:
    points = [point for line in chart.series for point in line.points]
    if not points:
        return 40, _text(WIDTH / 2, 24, "nothing was measured")
    ends = [
        y + s * e for line in chart.series for (_, y), e in zip(line.points, line.errors, strict=False) for s in (-1, 1)
    ]
    level = [] if chart.level is None else [chart.level]
    bottom, top = _range([y for _, y in points] + ends + level)
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    if chart.ticks or first == last:
        first, last = first - 0.25, last + 0.25

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - first) / (last - first) * (WIDTH - _LEFT - _RIGHT)
        return across, HEIGHT - _BOTTOM - (y - bottom) / (top - bottom) * (HEIGHT - _TOP - _BOTTOM)

    parts = []
    for y in nice_ticks(bottom, top):
        _, down = place(first, y)
        parts += [_line(_LEFT, down, WIDTH - _RIGHT, down, "grid"), _text(_LEFT - 6, down + 4, number(y), anchor="end")]
    for x, label in (chart.ticks or {x: number(x) for x in nice_ticks(first, last)}).items():
        parts.append(_text(place(x, bottom)[0], HEIGHT - _BOTTOM + 15, shortened(label, 12)))
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 3, chart.x_label, "soft"))
    if chart.level is not None:
        down = place(first, chart.level)[1]
        parts.append(_line(_LEFT, down, WIDTH - _RIGHT, down, "level"))
    parts += _boundaries(chart, [place(max(x, first), bottom)[0] for x, _ in chart.boundaries])
    for index, line in enumerate(chart.series):
        parts += _one_line(line, f"s{index % COLOURS}", place, bool(chart.ticks))
    return HEIGHT, "".join(parts)


def _boundaries(chart: LineChart, places: list[float]) -> list[str]:
    parts = []
    for number_, ((_, name), across) in enumerate(zip(chart.boundaries, places, strict=True)):
        after = places[number_ + 1] if number_ + 1 < len(places) else WIDTH - _RIGHT
        if number_:
            parts.append(_line(across, _TOP - 4, across, HEIGHT - _BOTTOM, "boundary"))
        # About 6 units a letter.
        if (room := int((after - across - 4) / 6)) >= 3:
            parts.append(_text(across + 3, _TOP, shortened(name, room), "soft", "start"))
    return parts


def _one_line(line: Series, css: str, place: Place, marked: bool) -> list[str]:
    places = [place(x, y) for x, y in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline points="{path}" class="line {css}"><title>{escape(line.name)}</title></polyline>']
    for (x, y), error in zip(line.points, line.errors, strict=False):
        across, above = place(x, y + error)
        parts.append(_line(across, above, across, place(x, y - error)[1], f"error {css}"))
    if marked or len(places) == 1:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" class="dot {css}"/>' for x, y in places]
    return parts


def _bars(chart: BarChart) -> tuple[int, str]:
    if not chart.bars:
        return 40, _text(WIDTH / 2, 24, "nothing was measured")
    left, row = 104, 30
    height = _TOP + row * len(chart.bars) + _BOTTOM
    low = min(0.0, *(value - error for _, value, error in chart.bars))
    high = chart.top if chart.top is not None else max(value + error for _, value, error in chart.bars) * 1.05 or 1.0

    def across(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - left - 48)

    parts = []
    for tick in nice_ticks(low, high):
        parts.append(_line(across(tick), _TOP, across(tick), height - _BOTTOM, "grid"))
        parts.append(_text(across(tick), height - _BOTTOM + 15, number(tick)))
    for index, (name, value, error) in enumerate(chart.bars):
        top = _TOP + row * index + 5
        start, end = sorted((across(0.0), across(value)))
        parts.append(_text(left - 8, top + 14, shortened(name, 15), anchor="end"))
        parts.append(f'<rect x="{start:.1f}" y="{top}" width="{end - start:.1f}" height="20" class="bar"/>')
        ends = across(value - error), across(value + error)
        parts.append(_line(ends[0], top + 10, ends[1], top + 10, "whisker"))
        parts.append(_text(max(end, ends[1]) + 5, top + 14, number(value), anchor="start"))
    if chart.level is not None:
        parts.append(_line(across(chart.level), _TOP, across(chart.level), height - _BOTTOM, "level"))
    return height, "".join(parts)
