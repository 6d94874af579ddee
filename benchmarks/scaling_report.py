"""Table and picture of `scaling.py`'s figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TITLES = {
    "vocabulary": "Rows of the head",
    "length": "Length of prompts and answers (times)",
    "pairs": "Pairs in a stage",
    "stages": "Stages, at equal data",
}


def _range(figures: list[float], digits: int) -> str:
    median, least, most = figures
    return f"{median:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


def markdown(report: dict[str, Any]) -> str:
    """The figures as Markdown: a summary, then a table an axis."""
    model, versions = report["model"], report["versions"]
    sizes = f"hidden {model['hidden']}, {model['layers']} layers, {'bf16-mixed' if report['bf16'] else 'fp32'}"
    lines = [
        "# How time and memory grow",
        "",
        f"Written by `python -m benchmarks.scaling --rounds {report['rounds']} --table`. Llama, {sizes}. "
        f"{report['method']}. {', '.join(f'{name} {number}' for name, number in versions.items())}.",
        "",
        "Time per FLOP is relative to the first point of an axis, the FLOPs by arithmetic. Memory is the peak above "
        "the imports; it is held against a line through the first point: in proportion to the vocabulary or the "
        "length, and level for pairs and stages.",
        "",
        "| axis | worst time per FLOP | within 10 % of linear | memory, last point / first | worst memory / line |",
        "|---|---|---|---|---|",
    ]
    for axis, found in report["axes"].items():
        within = "yes" if found["within_10_percent"] else "no"
        memory = f"{found['peak_mb_last_to_first']:.2f} | {found['worst_memory_per_line']:.2f}"
        lines.append(f"| {axis} | {found['worst_time_per_flop']:.2f} | {within} | {memory} |")
    for axis, found in report["axes"].items():
        lines += ["", f"| {TITLES[axis]} | GFLOP | CPU s | time per FLOP | peak MB |", "|---|---|---|---|---|"]
        for row in found["points"]:
            times = f"{_range(row['seconds'], 2)} | {_range(row['time_per_flop'], 2)}"
            lines.append(f"| {row['value']:g} | {row['gflop']:.0f} | {times} | {_range(row['peak_mb'], 0)} |")
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """One panel an axis: time, memory and FLOPs against the first point, time per FLOP written at each point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
    for panel, (axis, found) in zip(grid.flat, report["axes"].items(), strict=False):
        _panel(panel, axis, found["points"])
    for panel in grid.flat[len(report["axes"]) :]:
        panel.set_visible(False)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.supylabel("relative to the first point (numbers: time per FLOP)")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _panel(panel: Any, axis: str, rows: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import NullLocator

    values = [row["value"] for row in rows]
    flops = [row["gflop"] / rows[0]["gflop"] for row in rows]
    panel.plot(values, flops, "--", color="0.45", label="FLOPs, by arithmetic")
    for key, color, label, mark in (
        ("seconds", "#0072B2", "CPU time", "o"),
        ("peak_mb", "#D55E00", "peak memory above imports", "s"),
    ):
        first = rows[0][key][0]
        medians, least, most = ([row[key][i] / first for row in rows] for i in range(3))
        panel.plot(values, medians, mark, linestyle="-", color=color, label=label, markersize=5)
        panel.vlines(values, least, most, color=color)
    for row, height in zip(rows, [row["seconds"][0] / rows[0]["seconds"][0] for row in rows], strict=True):
        panel.annotate(
            f"{row['time_per_flop'][0]:.2f}", (row["value"], height), (0, 7), textcoords="offset points", ha="center"
        )
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    highest = max([*flops, *(row["seconds"][2] / rows[0]["seconds"][0] for row in rows)])
    ticks = [tick for tick in (0.5, 1, 2, 4, 8, 16, 32, 64) if tick < 2 * highest]
    panel.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    panel.set_xticks(values, [f"{v // 1024:g}k" if v >= 1024 else f"{v:g}" for v in values])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_minor_locator(NullLocator())
    panel.set_ylim(0.5, max(2.2, 1.35 * highest))
    panel.margins(x=0.1)
    panel.set_title(TITLES[axis], fontsize=11)
    panel.grid(True, color="0.9")
    panel.spines[["top", "right"]].set_visible(False)
