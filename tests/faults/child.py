"""What runs in each forked process: the real command line, its output in a file, and one defect on request."""

from __future__ import annotations

import errno
import os
import pathlib
import resource
import signal
import sys
import time
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
from lightning.pytorch.callbacks import timer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from sdpo_lightning import (
    BackgroundWrites,
    DPOLitModule,
    StageCheckpoint,
    callbacks,
    export,
    failpoints,
    reference_weights,
)
from sdpo_lightning.cli import main

torch.set_num_threads(1)


def run_cli(words: list[str], env: dict[str, str], output: str, defect: str | None) -> None:
    """Run `sdpo-lightning` and end the process as the command line does."""
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(env)
    # Read from the environment when Lightning was imported.
    rank_zero_only.rank = int(env.get("LOCAL_RANK", 0))
    if "SDPO_FILE_LIMIT" in env:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(env["SDPO_FILE_LIMIT"]), -1))
    if "SDPO_DIES" in env:
        _die_with_the_peer(Path(output).parent, env["SDPO_DIES"])
    if "SDPO_DENY" in env:
        _deny_commits()
    if defect is not None:
        DEFECTS[defect]()
    main(words)


def _die_with_the_peer(folder: Path, who: str) -> None:
    """Where rank 0 reaches its failpoint, `both` ranks or `rank 1` alone get SIGKILL."""

    def end() -> None:
        pid = int((folder / "rank-1.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        if who == "both":
            os.kill(os.getpid(), signal.SIGKILL)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.01)

    failpoints.end = end
    if os.environ.get("LOCAL_RANK") == "1":
        (folder / "rank-1.pid").write_text(str(os.getpid()))


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
    reference_weights.check_reference_digest = lambda *_: None


def _reference_stays() -> None:
    """The reference doesn't advance at a boundary, and the self-check is off."""
    callbacks.StageTransition.should_advance = lambda *_: False


def _nan_weight() -> None:
    """An embedding becomes NaN before step 6."""
    step = DPOLitModule.training_step

    def steps(self: DPOLitModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step == 5:
            self.policy.model.get_input_embeddings().weight.data[:] = float("nan")
        return step(self, batch, batch_idx)

    DPOLitModule.training_step = steps


def _minus_inf_logps() -> None:
    """At step 6 an answer is impossible: the loss is 0 and its gradient finite."""
    step = DPOLitModule.compute_logps

    # By its own name: cached logps of the same function are still good.
    @wraps(step)
    def computes(self: DPOLitModule, model: torch.nn.Module, batch: Any) -> Any:
        logps = step(self, model, batch)
        if self.trainer.global_step == 5 and model is self.policy and torch.is_grad_enabled():
            logps.rejected = torch.full_like(logps.rejected, -float("inf"))
        return logps

    DPOLitModule.compute_logps = computes


DEFECTS = {
    "reference_is_s": _reference_is_s,
    "reference_stays": _reference_stays,
    "nan_weight": _nan_weight,
    "minus_inf_logps": _minus_inf_logps,
}


class RowsSeen(pl.Callback):
    """`rows.txt`: the pairs of each micro-batch, one line a step; a resumed run drops what it repeats."""

    def __init__(self) -> None:
        self._pending: list[int] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop the lines beyond the checkpoint."""
        name = f"rows-{trainer.global_rank}.txt" if trainer.global_rank else "rows.txt"
        self._path = Path(trainer.default_root_dir) / name
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
    """Sends itself a signal at a named place of stage 2, or of the ranking: `SDPO_SIGNAL=place:signal`."""

    _sent = False

    def setup(self, trainer, pl_module, stage) -> None:
        """Watch what has no hook."""
        if "SDPO_SIGNAL" not in os.environ:
            return
        score, save, advance = pl_module.score, export.save_hf, pl_module.reference.advance

        def scores(model, batch):
            self._at("ranking")
            return score(model, batch)

        def saves(*arguments):
            self._at("export")
            save(*arguments)

        def advances(policy, stage, inputs):
            if stage.index == 2:
                self._at("reference")
            advance(policy, stage, inputs)

        pl_module.score, export.save_hf, pl_module.reference.advance = scores, saves, advances

    def _at(self, place: str) -> None:
        wanted, _, number = os.environ.get("SDPO_SIGNAL", "").partition(":")
        if wanted == place and (place == "twice" or not self._sent):
            self._sent = True
            os.kill(os.getpid(), int(number))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        """Within step 5, which lies in stage 2."""
        if os.environ.get("SDPO_SIGNAL") == "wait:0":
            time.sleep(60)
        if trainer.global_step == 4:
            self._at("step")
            self._at("twice")
            self._at("twice")

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        """Within the validation at the end of stage 2."""
        if trainer.current_epoch == 1:
            self._at("validation")


class Hour(pl.Callback):
    """Lets an hour pass by the clock within step 5, which lies in stage 2."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        """Set the clock forward, once."""
        if trainer.global_step == 4:
            monotonic = time.monotonic
            timer.time = SimpleNamespace(monotonic=lambda: monotonic() + 3600)


class Checkpoints(StageCheckpoint):
    """Every second step, and at the end of every stage."""

    def __init__(self) -> None:
        super().__init__(every_n_train_steps=2)


class Elsewhere(StageCheckpoint):
    """Every second step, in a folder that isn't the run's."""

    def __init__(self) -> None:
        super().__init__(dirpath=os.environ["SDPO_ELSEWHERE"], every_n_train_steps=2)


class AllCheckpoints(StageCheckpoint):
    """Every second step, and none is deleted."""

    def __init__(self) -> None:
        super().__init__(every_n_train_steps=2, save_top_k=-1)


class BackgroundCheckpoints(StageCheckpoint):
    """As above, written while training goes on."""

    def __init__(self) -> None:
        super().__init__(every_n_train_steps=2, writes=BackgroundWrites())
