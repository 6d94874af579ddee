"""Short runs that many tests start."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from helpers import make_rows, write_jsonl
from safetensors.torch import load_file

from sdpo_lightning import CurriculumDataModule, DPOLitModule, PreferenceSource, ResidentReference, StageSamples
from sdpo_lightning.cli import CurriculumCLI


class ParsesOnly(CurriculumCLI):
    """Reads a configuration and makes nothing of it."""

    def before_instantiate_classes(self):
        pass

    def instantiate_classes(self):
        pass

    def _run_subcommand(self, subcommand):
        pass


def parity_in_this_process(who: str, words: list[str]) -> None:
    """A side of `parity` here instead of in a program: what it imports is there already."""
    import_module(words[0]).main(*words[1:])


def run_as_rank(main: Callable[[], None]) -> NoReturn:
    """A script of several gloo processes, which end together."""
    torch.set_num_threads(1)
    main()
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    # Gloo's threads now and then keep an interpreter from ending.
    os._exit(0)


def adamw(lr: float = 1e-3, weight_decay: float = 0.1):
    return lambda params: torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay)


def fit(
    run_dir: Path,
    model_dir: Path | str,
    sources: list[PreferenceSource],
    ckpt_path: Path | None = None,
    reference=None,
    callbacks=(),
    module_class=DPOLitModule,
    data_class=CurriculumDataModule,
    module_args: dict | None = None,
    trainer_args: dict | None = None,
    answer_tokens: int | None = 2,
    **data_args,
) -> tuple[pl.Trainer, DPOLitModule]:
    """One `fit`, as a plain Trainer does it; returns trainer and module."""
    module_args = {"optimizer": adamw(), "warmup_ratio": 0.2} | (module_args or {})
    data_args = {"order": "given", "batch_size": 2, "max_length": 64} | data_args
    trainer_args = {"log_every_n_steps": 1, "logger": False, "accelerator": "cpu"} | (trainer_args or {})
    if answer_tokens is not None:
        # The default's 64 would take longer than the training.
        callbacks = [*callbacks, StageSamples(max_new_tokens=answer_tokens)]
    pl.seed_everything(0)
    module = module_class(str(model_dir), reference=reference or ResidentReference(), **module_args)
    trainer = pl.Trainer(
        default_root_dir=run_dir, callbacks=list(callbacks), enable_progress_bar=False, **trainer_args
    )
    trainer.fit(module, data_class(sources, **data_args), ckpt_path=ckpt_path)
    return trainer, module


def made_sources(folder: Path, counts: dict[str, int]) -> list[PreferenceSource]:
    """A file in `folder` for each name, with so many rows; seeds are 0, 1, ..."""
    return [
        PreferenceSource(name, str(write_jsonl(folder / f"{name}.jsonl", make_rows(count, seed, name))))
        for seed, (name, count) in enumerate(counts.items())
    ]


def command_line(folder: Path, model_dir: Path, counts: dict[str, int]) -> list[str]:
    """Words, without a verb, for a run in `folder / "run"` on `made_sources`."""
    sources = [{"name": source.name, "path": source.path} for source in made_sources(folder, counts)]
    return [
        f"--trainer.default_root_dir={folder / 'run'}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--model.model_name_or_path={model_dir}",
        f"--data.sources={json.dumps(sources)}",
        "--data.max_length=64",
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder."""
    return load_file(folder / "model.safetensors")


def assert_same_weights(left: Path, right: Path) -> None:
    """Bitwise equality of two Hugging Face folders."""
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def metrics(run_dir: Path) -> list[dict[str, str]]:
    """Rows of `metrics.csv`."""
    with (run_dir / "metrics.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


def losses(run_dir: Path) -> list[float]:
    """Loss of every optimizer step."""
    return [float(row["train/loss"]) for row in metrics(run_dir)]


MEASURED = ("train/tokens_per_second", "train/peak_memory")


def reproducible(run_dir: Path) -> list[dict[str, str]]:
    """Rows of `metrics.csv` without the columns that a clock or the machine decides."""
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in metrics(run_dir)]
