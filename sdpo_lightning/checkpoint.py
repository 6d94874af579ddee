"""Rank 4: checkpoints that resume exactly."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from sdpo_lightning.types import ConfigurationError


class StageCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint that defers a save due on an epoch's last batch to the epoch's end.

    A save in between belongs to neither epoch: Lightning resumes from it in the middle of the next stage.

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
    ) -> None:
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
        self._deferred_validation = False
        self._step = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save beside the run's other files, whatever the logger."""
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir).absolute() / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, unless the epoch ends here; never between the micro-batches of a step: their gradient isn't saved."""
        if trainer.is_last_batch:
            self._deferred = [outputs, batch, batch_idx]
            return
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.should_stop or trainer.global_step == trainer.max_steps:
            assert self.dirpath is not None
            trainer.save_checkpoint(Path(self.dirpath) / f"stopped-step={trainer.global_step}.ckpt")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, unless the epoch ends here."""
        if trainer.state.fn == "fit" and trainer.is_last_batch:
            self._deferred_validation = True
        else:
            super().on_validation_end(trainer, pl_module)

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


def refuse_plain_checkpoints(trainer: pl.Trainer) -> None:
    """Refuse a ModelCheckpoint with settings of its own.

    Raises:
        ConfigurationError: with what to use instead.
    """
    for callback in trainer.checkpoint_callbacks:
        plain = type(callback) is ModelCheckpoint
        given = (callback.monitor, callback.dirpath, callback.filename, callback.save_last)
        default = plain and not any(given) and callback.save_top_k == callback.every_n_epochs == 1
        if plain and not default:
            raise ConfigurationError(
                "a plain ModelCheckpoint can't be resumed exactly where a save falls on an epoch's last batch; "
                "use sdpo_lightning.StageCheckpoint with the same arguments in `trainer.callbacks`"
            )
