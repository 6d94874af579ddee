"""One unit of work is a row of one seed; its result is a file, which a rerun leaves as it is."""

from __future__ import annotations

import csv
import json
import logging
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from benchmarks.paper.evaluation import evaluate
from benchmarks.paper.language import SOURCES, make_pairs, prompts_of, wrong_share
from benchmarks.paper.rows import Inputs, Row, Settings, make_rows
from benchmarks.paper.sft import write_sft
from sdpo_lightning import CurriculumDataModule, PreferenceSource, StageSamples
from sdpo_lightning.files import write_json
from sdpo_lightning.report_callback import RunReport

# Pairs that the external reference was aligned on are another seed's.
_OTHER_PAIRS = 100_000


class NoReport(RunReport):
    """A page of each of some hundred runs isn't looked at."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing."""


@contextmanager
def quiet() -> Iterator[None]:
    """Hundreds of runs: what each would say of itself isn't wanted."""
    names = ("lightning.pytorch", "sdpo_lightning", "transformers")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        enable_progress_bar()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def write_pairs(folder: Path, settings: Settings, seed: int) -> None:
    """`<source>.jsonl` and `<source>.test.jsonl` of both sources."""
    folder.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        for split, count, ending in (("train", settings.pairs[source], ""), ("test", settings.held_out, ".test")):
            rows = make_pairs(source, count, seed, split)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{source}{ending}.jsonl").write_text(text, encoding="utf-8")


class Bench:
    """The units of a work folder.

    Args:
        work: folder of inputs and results.
        settings: of all rows.
    """

    def __init__(self, work: Path, settings: Settings) -> None:
        self.work, self.settings = work, settings
        self.rows = make_rows(settings)

    # ---- inputs

    def folder(self, seed: int) -> Path:
        """Of a seed's inputs."""
        return self.work / "inputs" / f"{seed:03d}"

    def inputs(self, seed: int) -> Inputs:
        """Models of a seed, made where they aren't there."""
        folder = self.folder(seed)
        if not (folder / "model").exists():
            write_pairs(folder, self.settings, seed)
            numbers = self.settings.sft_steps, 128, self.settings.hidden
            write_sft(folder / "part", seed, *numbers)
            (folder / "part").rename(folder / "model")
        return Inputs(folder / "model", folder / "external")

    def align_external(self, seed: int) -> None:
        """Plain DPO of S on pairs of which no row has one; where it isn't there."""
        inputs = self.inputs(seed)
        if inputs.external.exists():
            return
        other = self.folder(seed) / "other"
        write_pairs(other, self.settings, seed + _OTHER_PAIRS)
        with TemporaryDirectory() as folder:
            self._fit(self.rows["dpo"], seed, Path(folder), other)
            shutil.copytree(next(Path(folder).glob("stages/01-*")), other / "part")
        (other / "part").rename(inputs.external)

    # ---- results

    def path(self, seed: int, name: str) -> Path:
        """Of a unit's result."""
        return self.work / "units" / f"{seed:03d}" / f"{name.replace(' ', '_')}.json"

    def settings_of(self, name: str) -> dict[str, Any]:
        """What a kept result must agree on."""
        own = {} if name == "s" else self.rows[name].settings(self.settings)
        return asdict(self.settings) | own

    def kept(self, seed: int, name: str) -> dict[str, Any] | None:
        """A result that is there and has these settings."""
        path = self.path(seed, name)
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        return found if found["settings"] == json.loads(json.dumps(self.settings_of(name))) else None

    def run(self, seed: int, name: str) -> dict[str, Any]:
        """The result of a unit, from its file or by doing it."""
        if (found := self.kept(seed, name)) is not None:
            return found
        began = time.perf_counter()
        inputs = self.inputs(seed)
        if name == "external":
            self.align_external(seed)
        result: dict[str, Any] = {"seed": seed, "row": name, "settings": self.settings_of(name)}
        if name == "s":
            result |= self._judge(inputs.sft, inputs, seed, name) | {"wrong_labels": self._wrong_labels(seed)}
        else:
            with TemporaryDirectory() as folder:
                self._fit(self.rows[name], seed, Path(folder), self.folder(seed))
                result |= read_run(Path(folder))
                last = sorted(Path(folder).glob("stages/0*"))[-1]
                result |= self._judge(last, inputs, seed, name)
        result["seconds"] = round(time.perf_counter() - began, 2)
        write_json(self.path(seed, name), result)
        return result

    def _wrong_labels(self, seed: int) -> dict[str, float]:
        texts = {source: (self.folder(seed) / f"{source}.jsonl").read_text() for source in SOURCES}
        return {source: wrong_share([json.loads(line) for line in t.splitlines()]) for source, t in texts.items()}

    def _judge(self, model: Path, inputs: Inputs, seed: int, name: str) -> dict[str, Any]:
        found = {}
        # What is chosen between is chosen by other prompts than those that it is then measured on.
        for split in ("validation", "test") if name.startswith(("dpo", "sdpo")) else ("test",):
            prompts = prompts_of(split)[:: -(-len(prompts_of(split)) // self.settings.prompts)]
            found[split] = evaluate(model, inputs.sft, prompts, self.settings.per_prompt, seed).row()
        return found

    def _fit(self, row: Row, seed: int, folder: Path, pairs: Path) -> None:
        sources = [
            PreferenceSource(name, str(pairs / f"{name}.jsonl"), val_path=str(pairs / f"{name}.test.jsonl"))
            for name in SOURCES
        ]
        fit(row, self.settings, self.inputs(seed), sources, seed, folder)


def fit(
    row: Row,
    settings: Settings,
    inputs: Inputs,
    sources: Sequence[PreferenceSource],
    seed: int,
    folder: Path,
    max_length: int = 32,
    val_fraction: float = 0.0,
) -> CurriculumDataModule:
    """Train a row; the run's files lie in its folder.

    Args:
        row: what to train.
        settings: what all rows have in common.
        inputs: S, and the external reference.
        sources: pairs.
        seed: of the order of the pairs.
        folder: empty.
        max_length: `data.max_length`.
        val_fraction: `data.val_fraction`.

    Returns:
        The data as the run has read it.
    """
    lr = row.lr or settings.lr
    data = CurriculumDataModule(
        list(sources),
        partition=row.partition,
        order=row.order,
        epochs_per_stage=row.epochs or settings.epochs,
        batch_size=settings.batch_size,
        pad_to_multiple_of=8,
        max_length=max_length,
        layout="padded",
        seed=seed,
        val_fraction=val_fraction,
        num_proc=1,
    )
    pl.seed_everything(seed, verbose=False)
    module = row.module(
        str(inputs.sft),
        beta=row.beta or settings.beta,
        reference=row.reference(settings, inputs),
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr, weight_decay=0.0, fused=True),
        policy_starts_at=row.policy_starts_at,
    )
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        log_every_n_steps=1,
        limit_val_batches=1,
        check_val_every_n_epoch=10**6,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[StageSamples(prompts=[]), NoReport()],
    )
    trainer.fit(module, data)
    return data


def read_run(folder: Path) -> dict[str, Any]:
    """What a run has left: stages, loss of each step, and each M_t on the held-out pairs, whose labels are right."""
    summary = json.loads((folder / "summary.json").read_text())
    with (folder / "metrics.csv").open(newline="") as handle:
        steps = list(csv.DictReader(handle))
    stages = [
        {
            key: stage[key]
            for key in ("index", "name", "pairs", "steps", "gamma_ref", "loss_first", "loss_last", "seconds")
        }
        for stage in summary["stages"]
    ]
    losses = [
        [round(float(step["train/loss"]), 5) for step in steps if int(float(step["stage/index"])) == stage["index"]]
        for stage in stages
    ]
    matrix = [
        {key: row[key] for key in ("model", "source", "gamma", "gamma_standard_error", "accuracy")}
        for row in json.loads((folder / "matrix.json").read_text())["rows"]
    ]
    last = max(row["model"] for row in matrix)
    accuracies = [row["accuracy"] for row in matrix if row["model"] == last]
    return {
        "order": json.loads((folder / "curriculum.json").read_text())["order"],
        "stages": stages,
        "steps": len(steps),
        "pairs": sum(stage["pairs"] for stage in stages),
        "gamma_ref": stages[-1]["gamma_ref"],
        "accuracy": sum(accuracies) / len(accuracies),
        "matrix": matrix,
        "losses": losses,
    }
