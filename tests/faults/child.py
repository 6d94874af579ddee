"""What runs in each forked process: the real command line, its output in a file, and one defect on request."""

from __future__ import annotations

import errno
import os
import pathlib
import resource
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import transformers.models.llama.modeling_llama  # noqa: F401

from sdpo_lightning import DPOLitModule, StageCheckpoint, callbacks, module
from sdpo_lightning.cli import main
from sdpo_lightning.random_states import collect_random_states  # noqa: F401

torch.set_num_threads(1)


def run_cli(words: list[str], env: dict[str, str], output: str, defect: str | None) -> None:
    """Run `sdpo-lightning` and end the process as the command line does."""
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(env)
    if "SDPO_FILE_LIMIT" in env:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(env["SDPO_FILE_LIMIT"]), -1))
    if "SDPO_DENY" in env:
        _deny_commits()
    if defect is not None:
        DEFECTS[defect]()
    main(words)


def _deny_commits() -> None:
    """What a folder without write permission does; root has it everywhere."""

    def deny(self: pathlib.Path, *arguments: Any, **named: Any) -> Any:
        if self.suffix == ".tmp" and ".ckpt" in self.name:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return opened(self, *arguments, **named)

    opened, pathlib.Path.open = pathlib.Path.open, deny


def _reference_is_s() -> None:
    """A resumed run takes S for its reference, and nothing compares digests."""
    load = DPOLitModule.load_reference_weights

    def loads_s(self: DPOLitModule, run_dir: Path) -> torch.nn.Module:
        self.record.folders.pop(self.record.reference, None)
        return load(self, run_dir)

    DPOLitModule.load_reference_weights = loads_s
    module.check_reference_digest = lambda *_: None


def _reference_stays() -> None:
    """The reference doesn't advance at a boundary, and the self-check is off."""
    callbacks.StageTransition.should_advance = lambda *_: False


DEFECTS = {"reference_is_s": _reference_is_s, "reference_stays": _reference_stays}


class RowsSeen(pl.Callback):
    """`rows.txt`: the pairs of each micro-batch, one line a step; a resumed run drops what it repeats."""

    def __init__(self) -> None:
        self._pending: list[int] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop the lines beyond the checkpoint."""
        self._path = Path(trainer.default_root_dir) / "rows.txt"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if int(line.split(":")[0]) <= trainer.global_step]
        self._path.write_text("".join(line + "\n" for line in kept))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        """Add the pairs; a line is written once its step is done."""
        self._pending += batch.pair_id[batch.weights > 0].tolist()
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch:
            with self._path.open("a") as handle:
                handle.write(f"{trainer.global_step}:{self._pending}\n")
            self._pending = []


class Signals(pl.Callback):
    """Sends itself a signal at a named place: `SDPO_SIGNAL=place:signal`."""

    def _at(self, place: str) -> None:
        wanted, _, number = os.environ.get("SDPO_SIGNAL", "").partition(":")
        if wanted == place:
            os.kill(os.getpid(), int(number))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        """Within step 5, which lies in stage 2."""
        if trainer.global_step == 4:
            self._at("step")

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        """Within the validation at the end of stage 2."""
        if trainer.current_epoch == 1:
            self._at("validation")


class Checkpoints(StageCheckpoint):
    """Every second step, and at the end of every stage."""

    def __init__(self) -> None:
        super().__init__(every_n_train_steps=2)
