"""Rank 3: the verb `report`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from sdpo_lightning.publishing import write_text
from sdpo_lightning.report_data import Run, read_run
from sdpo_lightning.report_figures import comparison_charts, run_charts
from sdpo_lightning.report_page import comparison_page, labels, run_page
from sdpo_lightning.report_png import can_draw, write_pngs
from sdpo_lightning.types import ConfigurationError
from sdpo_lightning.verbs import verb_parser


def run_report(words: Sequence[str]) -> None:
    """Write `report.html`, and PNGs where matplotlib is installed.

    Args:
        words: after `report`: run directories, `--out FILE`.

    Raises:
        ConfigurationError: a folder is no run.
    """
    options = verb_parser("report").parse_args(list(words))
    try:
        runs = [read_run(folder) for folder in options.runs]
    except FileNotFoundError as error:
        raise ConfigurationError(f"`report`: {error}; give a run's `trainer.default_root_dir`") from error
    several = len(runs) > 1
    out = options.out or (Path("comparison.html") if several else runs[0].folder / "report.html")
    write_text(out, comparison_page(runs) if several else run_page(runs[0]))
    print(f"written: {out}")
    for name, why in [pair for run in runs for pair in run.missing.items()]:
        print(f"left out: {name} ({why})")
    if can_draw():
        charts = comparison_charts(runs, labels(runs)) if several else run_charts(runs[0])
        folder = out.with_suffix("")
        print(f"written: {len(write_pngs(charts, folder))} PNGs in {folder}")
    else:
        print("no PNGs: matplotlib is missing (the `[report]` extra)")


def report_run(folder: Path) -> Run:
    """Write `report.html` into a run's folder, as `fit` does at its end.

    Args:
        folder: the run directory.
    """
    run = read_run(folder)
    write_text(folder / "report.html", run_page(run))
    return run


def draw_run(run: Run) -> list[Path]:
    """Draw a run's charts into `report/`, as `fit` does at its end, without matplotlib's own warnings.

    Args:
        run: as read.

    Returns:
        The PNGs; none where matplotlib is missing.
    """
    if not can_draw():
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return write_pngs(run_charts(run), run.folder / "report")
