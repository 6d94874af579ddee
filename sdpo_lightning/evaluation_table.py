"""Rank 3: what `evaluate` leaves of a suite by lm-eval: one table over the models, as JSON and as Markdown."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdpo_lightning.evaluation import Figure, Suite, mean_figure
from sdpo_lightning.files import write_json
from sdpo_lightning.ledger import set_aside
from sdpo_lightning.publishing import write_text

log = logging.getLogger(__name__)

Row = dict[str, Any]


class EvaluationTable:
    """`SUITE.json` and `SUITE.md` in a folder, written anew after each task, so that a rerun goes on there.

    Args:
        folder: of the files.
        suite: the columns.
        settings: of all rows; a file with others is moved to `stale/`.
        versions: name -> version, of all rows.
    """

    def __init__(self, folder: Path, suite: Suite, settings: Mapping[str, Any], versions: Mapping[str, str]) -> None:
        self._path = folder / f"{suite.name}.json"
        self._suite = suite
        self._head: dict[str, Any] = {"suite": suite.name, "settings": dict(settings), "versions": dict(versions)}
        self.rows: list[Row] = []
        found = json.loads(self._path.read_text()) if self._path.exists() else None
        if found is not None and {key: found.get(key) for key in self._head} == self._head:
            self.rows = found["rows"]
        elif found is not None:
            log.warning("%s is of other settings or versions: moved to %s", self._path, folder / "stale")
            set_aside(folder, self._path)
            set_aside(folder, self._path.with_suffix(".md"))

    def missing(self, sha256: str) -> list[str]:
        """Tasks that a model has no figures of.

        Args:
            sha256: of the model.
        """
        known = {row["task"] for row in self.rows if row["sha256"] == sha256}
        return [task for task in self._suite.tasks() if task not in known]

    def add(self, label: str, sha256: str, figures: Sequence[Figure]) -> None:
        """Put the figures of a task into the files."""
        self.rows += [{"model": label, "sha256": sha256, **asdict(figure)} for figure in figures]
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, models: Sequence[tuple[str, str]], left_out: Mapping[str, str]) -> str:
        """Write both files.

        Args:
            models: label and sha256 of each line, in order; rows of other models go.
            left_out: label -> why.

        Returns:
            The table in Markdown.
        """
        self.rows = [row | {"model": label} for label, sha256 in models for row in self._figures(sha256).values()]
        means = {label: mean_figure(self._suite, self._figures(sha256)) for label, sha256 in models}
        known = {label: {"value": m[0], "standard_error": m[1]} for label, m in means.items() if m is not None}
        write_json(self._path, self._head | {"rows": self.rows, "means": known, "left_out": dict(left_out)})
        text = self._markdown(models, left_out)
        write_text(self._path.with_suffix(".md"), text)
        return text

    def _figures(self, sha256: str) -> dict[str, Row]:
        return {row["label"]: row for row in self.rows if row["sha256"] == sha256}

    def _markdown(self, models: Sequence[tuple[str, str]], left_out: Mapping[str, str]) -> str:
        suite = self._suite
        heads = [measure.label for measure in suite.measures] + ([suite.mean] if suite.mean else [])
        lines = ["| model | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        for label, sha256 in models:
            figures = self._figures(sha256)
            cells = [_cell(figures.get(m.label)) for m in suite.measures]
            if suite.mean:
                mean = mean_figure(suite, figures)
                cells.append(_cell(None if mean is None else {"value": mean[0], "standard_error": mean[1]}))
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        tasks = {row["task"]: row for row in self.rows}
        told = [
            f"{row['task']} {row['task_version']}, {row['shots']}-shot {row['metric']}, {row['documents']} documents"
            for row in tasks.values()
        ]
        notes = ["value ± standard error; " + "; ".join(told)] if told else []
        notes.append(", ".join(f"{name} {number}" for name, number in self._head["versions"].items()))
        notes.append(", ".join(f"{key}: {value}" for key, value in self._head["settings"].items()))
        notes += [f"{label} is left out: {why}" for label, why in left_out.items()]
        return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def _cell(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "-"
    error = figure["standard_error"]
    return f"{figure['value']:.2f}" + ("" if error is None else f" ± {error:.2f}")
