"""Rank 2: benchmarks of models by lm-eval (extra `[eval]`), run in this process."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from sdpo_lightning.types import ConfigurationError


@dataclass(frozen=True)
class Measure:
    """One figure of a suite.

    Attributes:
        label: head of its column.
        task: lm-eval's name of a task or group.
        shots: examples in the context.
        metric: of the task.
        scale: factor from lm-eval's figure to the table's.
    """

    label: str
    task: str
    shots: int
    metric: str
    scale: float = 1.0


@dataclass(frozen=True)
class Suite:
    """Figures that stand in one table.

    Attributes:
        name: of the suite and its files.
        measures: the columns.
        mean: head of a last column, the mean of all; None has none.
    """

    name: str
    measures: tuple[Measure, ...]
    mean: str | None = None

    def tasks(self) -> dict[str, int]:
        """Task -> examples in the context, each task once."""
        return {measure.task: measure.shots for measure in self.measures}


# The six-task leaderboard without Winogrande and GSM8K (sDPO, section 4.1).
H4 = Suite(
    "h4",
    (
        Measure("ARC", "arc_challenge", 25, "acc_norm", 100),
        Measure("HellaSwag", "hellaswag", 10, "acc_norm", 100),
        Measure("MMLU", "mmlu", 5, "acc", 100),
        Measure("TruthfulQA", "truthfulqa_mc2", 0, "acc", 100),
    ),
    mean="H4",
)
# lm-eval's task asks once and scores the first answer: it has no revision part.
EQ_BENCH = Suite(
    "eq_bench",
    (Measure("EQ-Bench", "eq_bench", 0, "eqbench"), Measure("parseable %", "eq_bench", 0, "percent_parseable")),
)


@dataclass(frozen=True)
class HarnessSettings:
    """How lm-eval runs a model. Results of other settings don't share a table.

    Attributes:
        batch_size: requests at a time.
        device: where the model runs.
        dtype: of its weights.
        apply_chat_template: whether prompts are turns of a dialogue.
        limit: only the first N documents of each task: for trying out, not for figures.
        task_folder: YAML files of tasks, which are then the only ones known; None: lm-eval's own.
    """

    batch_size: int
    device: str
    dtype: str
    apply_chat_template: bool = False
    limit: int | None = None
    task_folder: str | None = None

    def record(self) -> dict[str, Any]:
        """As plain values, without what changes no figure by intent."""
        return {key: value for key, value in asdict(self).items() if key not in ("batch_size", "device")}


@dataclass(frozen=True)
class Figure:
    """One cell of a table.

    Attributes:
        label: of its measure.
        task: lm-eval's name.
        metric: of the task.
        shots: examples in the context.
        value: on the table's scale.
        standard_error: of the value on that scale; None where lm-eval gives none.
        documents: that were scored.
        task_version: of lm-eval's task.
        max_length: tokens of the model's context; lm-eval cuts longer prompts from the left.
    """

    label: str
    task: str
    metric: str
    shots: int
    value: float
    standard_error: float | None
    documents: int
    task_version: str
    max_length: int


def check_installed() -> None:
    """Look for lm-eval before anything is read.

    Raises:
        ConfigurationError: it isn't there.
    """
    if find_spec("lm_eval") is None:
        raise ConfigurationError("`evaluate` needs lm-eval: `pip install 'sdpo-lightning[eval]'`")


def versions() -> dict[str, str]:
    """Versions that figures depend on."""
    names = ("sdpo-lightning", "lm-eval", "transformers", "torch", "datasets")
    return {name: version(name) for name in names}


class Harness:
    """lm-eval with its list of tasks.

    Args:
        settings: of all models.

    Raises:
        ConfigurationError: lm-eval isn't installed, or there is no folder of tasks.
    """

    def __init__(self, settings: HarnessSettings) -> None:
        check_installed()
        from lm_eval.tasks import TaskManager

        folder = settings.task_folder
        if folder is not None and not Path(folder).is_dir():
            raise ConfigurationError(f"`--task_folder` is {folder!r}, expected a folder of lm-eval's YAML files")
        self._settings = settings
        self._manager = TaskManager(include_path=folder, include_defaults=folder is None)

    def check(self, suite: Suite) -> None:
        """Refuse a suite whose tasks aren't known.

        Raises:
            ConfigurationError: naming them.
        """
        unknown = sorted(set(suite.tasks()) - set(self._manager.all_tasks))
        if unknown:
            raise ConfigurationError(
                f"suite {suite.name!r}: lm-eval {version('lm-eval')} knows no {unknown}; "
                f"{'see `--task_folder`' if self._settings.task_folder else 'install another version'}"
            )

    def run(self, folder: str, base: str | None, suite: Suite, tasks: Sequence[str]) -> Iterator[list[Figure]]:
        """The figures of one model, task after task. It is loaded once, and freed at the end.

        Args:
            folder: of the model, or its hub name; of an adapter where there is a base.
            base: the model below an adapter.
            suite: names the figures.
            tasks: those of the suite that are run.

        Raises:
            ConfigurationError: a task that has other examples, or no such metric.
            OSError: a model or a data set that can't be read.
        """
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        given = self._settings
        where = {"pretrained": folder} if base is None else {"pretrained": base, "peft": folder}
        model = HFLM(
            **where, dtype=given.dtype, device=given.device, batch_size=given.batch_size, trust_remote_code=False
        )
        try:
            for task in tasks:
                found = simple_evaluate(
                    model=model,
                    tasks=[task],
                    num_fewshot=suite.tasks()[task],
                    limit=given.limit,
                    apply_chat_template=given.apply_chat_template,
                    log_samples=False,
                    task_manager=self._manager,
                )
                yield [read_figure(found, m, model.max_length) for m in suite.measures if m.task == task]
        finally:
            del model
            gc.collect()
            if given.device.startswith("cuda"):
                torch.cuda.empty_cache()


def read_figure(results: Mapping[str, Any], measure: Measure, max_length: int) -> Figure:
    """A figure of what `simple_evaluate` gives.

    Args:
        results: of one task or group.
        measure: which of its figures.
        max_length: of the model.

    Raises:
        ConfigurationError: the task was run with other examples than the suite says, or has no such metric.
    """
    leaves = _leaves(results, measure.task)
    other = {task: results["n-shot"][task] for task in leaves if results["n-shot"][task] != measure.shots}
    if other:
        raise ConfigurationError(f"lm-eval ran {other} examples in the context, expected {measure.shots}: see its YAML")
    row = results["results"][measure.task]
    # The part behind the comma names the filter of answers.
    value = next((v for key, v in row.items() if key.split(",")[0] == measure.metric), None)
    error = next((v for key, v in row.items() if key.split(",")[0] == f"{measure.metric}_stderr"), None)
    if value is None:
        raise ConfigurationError(f"lm-eval's task {measure.task!r} has no {measure.metric!r}, only {sorted(row)}")
    return Figure(
        measure.label,
        measure.task,
        measure.metric,
        measure.shots,
        measure.scale * value,
        measure.scale * error if isinstance(error, int | float) and math.isfinite(error) else None,
        sum(results["n-samples"][task]["effective"] for task in leaves),
        str(results["versions"].get(measure.task)),
        max_length,
    )


def _leaves(results: Mapping[str, Any], task: str) -> list[str]:
    inner = results.get("group_subtasks", {}).get(task)
    return [leaf for name in inner for leaf in _leaves(results, name)] if inner else [task]


def mean_figure(suite: Suite, figures: Mapping[str, Mapping[str, Any]]) -> tuple[float, float | None] | None:
    """Mean of a suite and its standard error; None where a figure is missing.

    The tasks have different questions, so the variances add up.

    Args:
        suite: of the figures.
        figures: label -> `value`, `standard_error`.
    """
    if suite.mean is None or any(measure.label not in figures for measure in suite.measures):
        return None
    rows = [figures[measure.label] for measure in suite.measures]
    errors = [row["standard_error"] for row in rows]
    known = all(error is not None for error in errors)
    value = sum(row["value"] for row in rows) / len(rows)
    return value, math.sqrt(sum(error**2 for error in errors)) / len(rows) if known else None
