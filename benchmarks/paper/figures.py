"""Figures 2 and 3 of the paper redrawn, and preference against KL, as PNGs by matplotlib (the `[report]` extra)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.paper.statistics import mean_and_error


def draw(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw all three.

    Args:
        found: what `results.json` holds.
        folder: for `figure_2.png`, `figure_3.png` and `preference_kl.png`.

    Returns:
        The files.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, fill in (("figure_2", _gamma), ("figure_3", _losses), ("preference_kl", _preference)):
        figure = Figure(figsize=(8.0, 4.2), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        fill(figure.add_subplot(), found)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1])
    return paths


def _gamma(axes: Any, found: Mapping[str, Any]) -> None:
    axes.set_title("Figure 2: mean gamma of S, M_1, M_2 on held-out pairs")
    for source, seeds in found["figure_2"].items():
        points = [mean_and_error(values) for values in zip(*seeds, strict=True)]
        errors = [0.0 if math.isnan(error) else error for _, error in points]
        means = [mean for mean, _ in points]
        axes.errorbar(range(len(points)), means, yerr=errors, marker="o", capsize=3, label=source)
    axes.set_xticks(range(3), ["S", "M_1", "M_2"])
    axes.set_ylabel("log pi(chosen) - log pi(rejected), nats")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.legend()


def _losses(axes: Any, found: Mapping[str, Any]) -> None:
    axes.set_title("Figure 3: loss of stage 2 by what the policy begins as")
    labels = {"sdpo": "M_1, as sDPO", "target_s": "S"}
    for name, losses in found["figure_3"].items():
        axes.plot(range(1, len(losses) + 1), losses, label=labels[name])
    axes.axhline(math.log(2), color="grey", linestyle=":", linewidth=1)
    axes.set_xlabel("optimizer step of the stage")
    axes.set_ylabel("loss, nats (mean over seeds)")
    axes.legend()


def _preference(axes: Any, found: Mapping[str, Any]) -> None:
    axes.set_title("True preference against KL to S, means over seeds", fontsize=10)
    rows = found["summary"]["rows"]
    # Means over other seeds can't be compared with these.
    rows = {name: row for name, row in rows.items() if row["seeds"] == rows["s"]["seeds"]}
    places = {name: (row["kl"][0], row["preference"][0]) for name, row in rows.items()}
    drawn = {name for name in ("s", *found["dpo_line"]) if name in places}
    points = sorted(places[name] for name in drawn)
    axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label="DPO: beta and steps varied")
    markers = iter("*sDv^<>pPXhd128")
    for name, title in found["titles"].items():
        if name in places and name not in drawn and not name.startswith("best"):
            axes.plot(*places[name], marker=next(markers), linestyle="none", label=title.split(" (")[0])
    others = [y for name, (_, y) in places.items() if name != "s"]
    # S lies far below all others.
    axes.set_ylim(min(others) - 2, max(others) + 1)
    axes.set_xlabel("KL(M_T to S), nats an answer")
    axes.set_ylabel("preferred to an SFT answer, %")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
