"""Rank 5: checkpoints that resume exactly."""

from __future__ import annotations

import logging
import shutil
from datetime import timedelta
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal
from weakref import proxy

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from sdpo_lightning.checkpoint_files import keep_newest, remove_checkpoint, save_file_atomically, sweep_checkpoints
from sdpo_lightning.checkpoint_writes import BackgroundWrites
from sdpo_lightning.loop_progress import validates_next
from sdpo_lightning.ranks import from_first_rank
from sdpo_lightning.run_parts import callbacks_of, is_try, stage_module
from sdpo_lightning.stopping import STOP
from sdpo_lightning.types import ConfigurationError, ResumeError

log = logging.getLogger(__name__)

# Seconds that a failed run waits for the checkpoint in the background.
_PATIENCE = 600.0


class DurableCheckpointIO(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all, on the disk itself, with their digest; read without pickles."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write one.

        Args:
            checkpoint: what Lightning has collected.
            path: of the file.
            storage_options: `BackgroundWrites`; None returns when all is on the disk.

        Raises:
            ConfigurationError: it lacks what a resume needs.
            OSError: it can't be written.
        """
        if "stage_record" not in checkpoint:
            raise ConfigurationError("the checkpoint has no stage record: `on_save_checkpoint` must call `super()`'s")
        if isinstance(storage_options, BackgroundWrites):
            held = storage_options.hold(checkpoint)
            storage_options.begin(lambda: save_file_atomically(held, Path(path)))
        else:
            save_file_atomically(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read one: tensors and plain values only.

        Raises:
            ResumeError: it is damaged, or holds other objects.
        """
        if Path(path).is_dir():
            raise ResumeError(
                f"`ckpt_path`: {path} is a checkpoint of shards; a run keeps its `trainer.strategy` when it goes on"
            )
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except UnpicklingError as error:
            raise ResumeError(
                "`ckpt_path` holds more than tensors and plain values, which might be code, and none of it was run: "
                f"{path}; give a checkpoint of a run of this package"
            ) from error
        except (RuntimeError, EOFError, ValueError, KeyError) as error:
            reason = str(error).partition("\n")[0]
            raise ResumeError(f"`ckpt_path`: {path} is damaged or no checkpoint of tensors ({reason})") from error

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete one and its digest."""
        remove_checkpoint(Path(path))


class StageCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that defers a save due on an epoch's last batch to the epoch's end.

    A save in between belongs to neither epoch: Lightning resumes from it in the middle of the next stage. Whatever the
    triggers, there is a checkpoint of a stage's end: the next stage's reference is exported from it.

    Args:
        dirpath: default `<default_root_dir>/checkpoints`.
        filename: as in ModelCheckpoint.
        monitor: as in ModelCheckpoint.
        mode: as in ModelCheckpoint.
        save_last: also keep `last.ckpt`.
        save_top_k: as in ModelCheckpoint; -1 keeps all.
        every_n_train_steps: optimizer steps between saves.
        train_time_interval: time between saves.
        every_n_epochs: epochs between saves; the default is 1 if no other trigger is given.
        every_minutes: minutes between saves, as `train_time_interval`.
        keep_last: checkpoints that stay, where neither `monitor` nor `save_top_k` says otherwise.
        writes: how a checkpoint that is due in the middle of a stage is written; None lets training wait for the disk.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_last: bool | None = None,
        save_top_k: int = 1,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        every_minutes: float | None = None,
        keep_last: int = 1,
        writes: BackgroundWrites | None = None,
    ) -> None:
        if keep_last < 1:
            raise ConfigurationError(f"`keep_last` of StageCheckpoint is {keep_last}, expected at least 1")
        if every_minutes is not None:
            train_time_interval = timedelta(minutes=every_minutes)
        self.keep_last = keep_last
        self._rotates = monitor is None and save_top_k == 1
        if self._rotates and keep_last > 1:
            save_top_k = -1
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            mode=mode,
            save_last=save_last,
            save_top_k=save_top_k,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=True,
        )
        self._deferred: list[Any] | None = None
        self._awaits_validation: list[Any] | None = None
        self._deferred_validation = False
        self._step = 0
        self._between_steps = False
        self.writes = writes
        # Whether one is being written, the same on all ranks; and what goes once it is there.
        self._under_way = False
        self._outdated: list[str] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save beside the run's other files, whatever the logger."""
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir).absolute() / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen for signals, and say if the disk is too small; where others keep checkpoints too, delete none."""
        super().on_train_start(trainer, pl_module)
        # The first micro-batch after a resume doesn't end a step.
        self._step = trainer.global_step
        # The run directory is swept when it is locked; a `dirpath` of its own may lie elsewhere.
        from_first_rank(lambda: sweep_checkpoints(Path(self.dirpath or "")))
        self._rotates &= all(callback is self for callback in trainer.checkpoint_callbacks)
        environment = trainer._accelerator_connector.cluster_environment
        # A requeueing SLURM job has its own way to end.
        requeues = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
        if STOP.is_heard() and not requeues:
            STOP.take_over()
            STOP.deferred = True
        if trainer.is_global_zero:
            self._warn_of_a_small_disk(pl_module)

    def _warn_of_a_small_disk(self, pl_module: pl.LightningModule) -> None:
        assert self.dirpath is not None
        weights = sum(p.numel() * p.element_size() for p in stage_module(pl_module).trainable())
        # AdamW's two states; one more than is kept, while it is written; and M_t.
        needed = 3 * weights * (self.keep_last + 1) + weights
        folder = next(folder for folder in (Path(self.dirpath), *Path(self.dirpath).parents) if folder.exists())
        free = shutil.disk_usage(folder).free
        if free < needed:
            log.warning("%s has %s bytes free; checkpoints need about %s", folder, f"{free:,}", f"{needed:,}")

    def _after_step(self, trainer: pl.Trainer, stops: bool, ends: bool) -> None:
        """Leave if a signal asks for it, with a checkpoint of this step; delete old ones."""
        if is_try(trainer):
            return
        asked = trainer.strategy.reduce_boolean_decision(STOP.signal is not None, all=False)
        if stops or ((asked or ends) and self._last_global_step_saved != trainer.global_step):
            assert self.dirpath is not None
            settle_all(trainer)
            name = f"{'stage-end' if ends else 'stopped'}-step={trainer.global_step}.ckpt"
            trainer.save_checkpoint(Path(self.dirpath) / name)
            self._last_global_step_saved = trainer.global_step
        if self._under_way:
            # Asked of all at each step: an error must end the same step everywhere.
            waits = stops or ends or asked
            if waits or trainer.strategy.reduce_boolean_decision(self.writes is None or self.writes.is_done()):
                self.settle(trainer)
        elif self._rotates and self._last_global_step_saved == trainer.global_step:
            self._rotate()
        if asked:
            log.warning("stopped by a signal at step %d; start the same command to go on", trainer.global_step)
            STOP.leave()

    # ---- saves in the background

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        settle_all(trainer)
        if self.writes is None:
            super()._save_checkpoint(trainer, filepath)
            return
        trainer.save_checkpoint(filepath, storage_options=self.writes)
        self._under_way = True
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.after_save_checkpoint(proxy(self))

    def _remove_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        if self._under_way:
            self._outdated.append(filepath)
        else:
            super()._remove_checkpoint(trainer, filepath)

    def _rotate(self) -> None:
        from_first_rank(lambda: keep_newest(Path(self.dirpath or ""), self.keep_last))

    def settle(self, trainer: pl.Trainer) -> None:
        """Wait for the checkpoint that is being written, then delete those that it replaces. A collective.

        Raises:
            OSError: it can't be written; on all ranks.
        """
        if not self._under_way:
            return
        assert self.writes is not None
        outdated, self._outdated, self._under_way = self._outdated, [], False
        self.writes.settle()
        for path in outdated:
            super()._remove_checkpoint(trainer, path)
        if self._rotates:
            self._rotate()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The run's end waits for its last checkpoint."""
        super().on_train_end(trainer, pl_module)
        self.settle(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let this rank finish what it writes; another one may be gone."""
        super().on_exception(trainer, pl_module, exception)
        if self.writes is not None:
            try:
                self.writes.join(_PATIENCE)
            except Exception as error:  # noqa: BLE001
                log.warning("the checkpoint that was being written isn't there: %s", error)

    # ---- when

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, unless the epoch ends here; never between the micro-batches of a step: their gradient isn't saved.

        Where a validation follows, after it: a run that goes on doesn't make up for it.
        """
        if trainer.is_last_batch:
            self._deferred = [outputs, batch, batch_idx]
            return
        self._between_steps = trainer.global_step != self._step
        if not self._between_steps:
            return
        self._step = trainer.global_step
        if validates_next(trainer.fit_loop):
            self._awaits_validation = [outputs, batch, batch_idx]
            return
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._after_step(trainer, trainer.should_stop or trainer.global_step == trainer.max_steps, False)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, unless the epoch ends here; also where a callback stops the run by what was measured."""
        awaiting, self._awaits_validation = self._awaits_validation, None
        if trainer.state.fn == "fit" and trainer.is_last_batch:
            # A stage may end here by what was measured.
            self._deferred = awaiting or self._deferred
            self._deferred_validation = True
            return
        if awaiting is not None:
            super().on_train_batch_end(trainer, pl_module, *awaiting)
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn != "fit":
            return
        unsaved = self._last_global_step_saved != trainer.global_step and self._between_steps
        if awaiting is not None:
            self._after_step(trainer, trainer.should_stop or trainer.global_step == trainer.max_steps, False)
        elif trainer.should_stop and unsaved:
            self._after_step(trainer, True, False)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what was due, then what is due at an epoch's end; not after a stop inside the epoch."""
        if not trainer.is_last_batch:
            return
        deferred, self._deferred = self._deferred, None
        validated, self._deferred_validation = self._deferred_validation, False
        if deferred is not None:
            super().on_train_batch_end(trainer, pl_module, *deferred)
        if validated:
            super().on_validation_end(trainer, pl_module)
        super().on_train_epoch_end(trainer, pl_module)
        stage = stage_module(pl_module).stage_under_way
        ends = trainer.current_epoch + 1 == stage.first_epoch + stage.epochs and self.save_top_k != 0
        self._after_step(trainer, False, ends)


def keep_patience_(checkpoint: dict[str, Any], trainer: pl.Trainer) -> None:
    """Have EarlyStopping's `patience` be that of this run: Lightning would take the checkpoint's without a word.

    Args:
        checkpoint: about to be restored; changed in place.
        trainer: of this run.
    """
    states = checkpoint.get("callbacks", {})
    for callback in callbacks_of(trainer):
        if isinstance(callback, EarlyStopping) and callback.state_key in states:
            states[callback.state_key]["patience"] = callback.patience


def settle_all(trainer: pl.Trainer) -> None:
    """One save at a time, whoever makes it: each looks at what is there, for its number."""
    for callback in (saver for saver in trainer.checkpoint_callbacks if isinstance(saver, StageCheckpoint)):
        callback.settle(trainer)


def refuse_plain_checkpoints(trainer: pl.Trainer) -> None:
    """Refuse a ModelCheckpoint with settings of its own.

    Raises:
        ConfigurationError: with what to use instead.
    """
    for callback in trainer.checkpoint_callbacks:
        if type(callback) is not ModelCheckpoint:
            continue
        given = (callback.monitor, callback.dirpath, callback.filename, callback.save_last)
        if any(given) or not callback.save_top_k == callback.every_n_epochs == 1:
            raise ConfigurationError(
                "a plain ModelCheckpoint can't be resumed exactly where a save falls on an epoch's last batch; "
                "use sdpo_lightning.StageCheckpoint with the same arguments in `trainer.callbacks`"
            )
