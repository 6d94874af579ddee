"""Rank 0: what a run directory holds, as plain values; what is missing is left out and named.

Imports neither torch nor Lightning.
"""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

Row = dict[str, Any]


@dataclass
class Run:
    """A run as it lies on disk.

    Attributes:
        name: of its folder.
        folder: the run directory.
        order: names of the sources in training order.
        sources: rows of `curriculum.json`.
        stages: rows of `summary.json`, of the curriculum where there is no summary yet.
        steps: rows of `metrics.csv`: column -> value, empty cells left out.
        matrix: rows of `matrix.json`, or what `metrics.csv` has of it: a model and a source each.
        samples: rows of `samples.json`: `model`, `prompt`, `source`, `answer`, `tokens`.
        drawn: rows of `sample_statistics.csv`, where the run measured that; as `steps`.
        findings: rows of `contamination.json`.
        config: text of `config.yaml`.
        versions: name -> version.
        missing: files that aren't there or can't be read, with the reason.
    """

    name: str
    folder: Path
    order: list[str] = field(default_factory=list)
    sources: list[Row] = field(default_factory=list)
    stages: list[Row] = field(default_factory=list)
    steps: list[dict[str, float]] = field(default_factory=list)
    matrix: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    drawn: list[dict[str, float]] = field(default_factory=list)
    findings: list[Row] = field(default_factory=list)
    config: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """Values of `config.yaml` under dotted names."""
        return dict(_flat("", yaml.safe_load(self.config) or {})) if self.config else {}

    def models(self) -> list[int]:
        """Indices t of the M_t that the matrix knows."""
        return sorted({row["model"] for row in self.matrix})

    def cell(self, model: int, source: str) -> Row:
        """The matrix's row of M_t on a source; empty where there is none."""
        return next((row for row in self.matrix if (row["model"], row["source"]) == (model, source)), {})

    def measured_sources(self) -> list[str]:
        """Sources of the matrix, in training order."""
        names = list(dict.fromkeys(row["source"] for row in self.matrix))
        return [n for n in self.order if n in names] + [n for n in names if n not in self.order]

    def boundaries(self) -> list[tuple[float, str]]:
        """First step of each stage, with its name."""
        found: dict[int, float] = {}
        for row in self.steps:
            found.setdefault(int(row["stage/index"]), row["step"])
        names = {int(stage["index"]): str(stage["name"]) for stage in self.stages}
        return [(step, names.get(index, f"stage {index}")) for index, step in found.items()]


def read_run(folder: Path) -> Run:
    """Read all that a report shows.

    Args:
        folder: the run directory.

    Returns:
        The run; files that aren't there stand in `missing`.

    Raises:
        FileNotFoundError: the folder holds neither `curriculum.json` nor `metrics.csv`: it is no run.
    """
    if not (folder / "curriculum.json").exists() and not (folder / "metrics.csv").exists():
        raise FileNotFoundError(f"{folder} holds neither curriculum.json nor metrics.csv")
    run = Run(folder.resolve().name, folder)
    curriculum = _json(run, "curriculum.json")
    run.order = curriculum.get("order", [])
    run.sources = curriculum.get("sources", [])
    planned = {row["index"]: row for row in curriculum.get("stages", [])}
    summarised = {row["index"]: row for row in _json(run, "summary.json").get("stages", [])}
    run.stages = [planned.get(i, {}) | summarised.get(i, {}) for i in sorted(planned.keys() | summarised.keys())]
    run.steps = _steps(run, "metrics.csv")
    if (folder / "sample_statistics.csv").exists():
        run.drawn = _steps(run, "sample_statistics.csv")
    run.matrix = _json(run, "matrix.json").get("rows", []) or _matrix_of_steps(run)
    run.samples = _json(run, "samples.json").get("rows", [])
    run.findings = _json(run, "contamination.json").get("findings", [])
    run.versions = _json(run, "versions.json")
    run.config = _text(run, "config.yaml")
    return run


def _text(run: Run, name: str) -> str:
    try:
        return (run.folder / name).read_text()
    except (OSError, UnicodeDecodeError) as error:
        run.missing[name] = "not there" if isinstance(error, FileNotFoundError) else str(error)
        return ""


def _json(run: Run, name: str) -> dict[str, Any]:
    text = _text(run, name)
    try:
        found = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        run.missing[name] = f"not JSON: {error}"
        found = {}
    return found if isinstance(found, dict) else {}


def _steps(run: Run, name: str) -> list[dict[str, float]]:
    lines = _text(run, name).splitlines(keepends=True)
    # The last line of a run that is being written may be cut off, in the midst of a number.
    whole = [line for line in lines if line.endswith("\n")]
    read = [{key: float(value) for key, value in row.items() if key and value} for row in csv.DictReader(whole)]
    return [row for row in read if {"step", "stage/index"} <= row.keys()]


def _matrix_of_steps(run: Run) -> list[Row]:
    """M_t on each source from the last held-out metrics of stage t; M_0 from the reference of stage 1."""
    last: dict[int, dict[str, float]] = {}
    for row in run.steps:
        if any(key.startswith("val/") for key in row):
            last[int(row["stage/index"])] = row
    rows: list[Row] = []
    for index, values in sorted(last.items()):
        for source in sorted(key[4:-6] for key in values if key.startswith("val/") and key.endswith("/pairs")):
            cell = {key.removeprefix(f"val/{source}/"): value for key, value in values.items()}
            common = {"source": source, "pairs": int(cell["pairs"])}
            if index == 1 and "gamma_ref" in cell:
                rows.append(common | {"model": 0, "gamma": cell["gamma_ref"]})
            names = {
                "gamma": "gamma",
                "accuracy": "accuracies_gamma",
                "reward_accuracy": "rewards/accuracies",
                "reward_accuracy_m0": "rewards_m0/accuracies",
            }
            rows.append(common | {"model": index} | {new: cell[old] for new, old in names.items() if old in cell})
    return rows


def _flat(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [
            pair for key, inner in value.items() for pair in _flat(f"{prefix}.{key}" if prefix else str(key), inner)
        ]
    return [(prefix, value)]


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
