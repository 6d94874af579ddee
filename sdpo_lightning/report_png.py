"""Rank 1: the charts as PNG files, by matplotlib (the `[report]` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdpo_lightning.publishing import publish
from sdpo_lightning.report_charts import BarChart, Chart, LineChart


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def write_pngs(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """Draw each chart into a file of its key.

    Args:
        charts: to draw.
        folder: made where it isn't there.

    Returns:
        The files.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for chart in charts:
        figure = Figure(figsize=(6.4, 4.0), dpi=120)
        FigureCanvasAgg(figure)
        # Margins by hand: a layout engine draws each figure twice, and a run of minutes waits for that.
        axes = figure.add_axes((_left(chart), 0.13, 0.96 - _left(chart), 0.77))
        axes.set_title(_plain(chart.title))
        _draw_bars(axes, chart) if isinstance(chart, BarChart) else _draw_lines(axes, chart)
        paths.append(folder / f"{chart.key}.png")
        staging = folder / f".{chart.key}.png.tmp"
        figure.savefig(staging, format="png")
        publish(staging, paths[-1])
    return paths


def _left(chart: Chart) -> float:
    """Room for what stands left of the axis, as a share of the width: the names of bars, else numbers."""
    names = [_short(name) for name, _, _ in chart.bars] if isinstance(chart, BarChart) else []
    return max([0.13, *(0.03 + 0.0125 * len(name) for name in names)])


def _draw_lines(axes: Any, chart: LineChart) -> None:
    marker = "o" if chart.ticks else None
    for line in chart.series:
        xs, ys = zip(*line.points, strict=True)
        axes.errorbar(xs, ys, yerr=line.errors or None, label=_plain(line.name), marker=marker, linewidth=1.5)
    for x, name in chart.boundaries:
        axes.axvline(x, color="grey", linestyle="--", linewidth=0.8)
        axes.text(x, 1.0, f" {_plain(name)}", transform=axes.get_xaxis_transform(), va="top", fontsize=8, color="grey")
    if chart.level is not None:
        axes.axhline(chart.level, color="grey", linestyle=":", linewidth=1)
    if chart.ticks:
        axes.set_xticks(list(chart.ticks), [_plain(label) for label in chart.ticks.values()])
    axes.set_xlabel(chart.x_label)
    if len(chart.series) > 1:
        axes.legend(fontsize=8)


def _draw_bars(axes: Any, chart: BarChart) -> None:
    names = [_plain(_short(name)) for name, _, _ in chart.bars]
    axes.barh(range(len(names)), [v for _, v, _ in chart.bars], xerr=[e for _, _, e in chart.bars], capsize=3)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    if chart.top is not None:
        axes.set_xlim(min(0.0, *(v - e for _, v, e in chart.bars)), chart.top)
    if chart.level is not None:
        axes.axvline(chart.level, color="grey", linestyle=":")


def _short(name: str) -> str:
    """At most half of the width."""
    return name if len(name) <= 37 else f"{name[:36]}…"


def _plain(text: str) -> str:
    """A name with dollar signs is no formula."""
    return text.replace("$", r"\$")
