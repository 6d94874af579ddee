"""Rank 4: the export of M_t."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from sdpo_lightning.backbone import weights_digest
from sdpo_lightning.failpoints import failpoint
from sdpo_lightning.hf_folder import save_hf, save_merged
from sdpo_lightning.ledger import Ledger
from sdpo_lightning.ranks import from_first_rank
from sdpo_lightning.retention import remove_models
from sdpo_lightning.types import ConfigurationError, Stage

log = logging.getLogger(__name__)


class StageExport(pl.Callback):
    """Writes M_t as a Hugging Face folder, `stages/0t-<stage name>`; with `model.lora` an adapter folder.

    Args:
        keep_last: models that stay; None keeps all. What a checkpoint or the reference needs stays beside them.

    Raises:
        ConfigurationError: none would stay.
    """

    def __init__(self, keep_last: int | None = None) -> None:
        if keep_last is not None and keep_last < 1:
            raise ConfigurationError(f"`keep_last` of StageExport is {keep_last}, expected at least 1, or none for all")
        self.keep_last = keep_last

    def export(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Write M_t, the policy at this moment, and record its digest.

        Args:
            trainer: gives the run directory.
            pl_module: holds the policy and the record.
            stage: the stage that has ended.
        """
        folder = Path("stages") / stage.folder_name
        digest = weights_digest(pl_module.policy)
        pl_module.record.digests[stage.index] = digest
        pl_module.record.folders[stage.index] = str(folder)
        target, tokenizer = run_dir(trainer) / folder, trainer.datamodule.tokenizer
        merged = target.with_name(f"{target.name}-merged")
        merges = pl_module.lora is not None and pl_module.lora.export_merged
        if from_first_rank(lambda: _is_there(run_dir(trainer), stage, digest) and (not merges or merged.is_dir())):
            log.info("M_%d is there already, in %s", stage.index, folder)
            return
        failpoint("before_export")
        save_hf(pl_module.policy, target, tokenizer)
        if merges:
            save_merged(pl_module.policy, merged, tokenizer)
        log.info("M_%d written to %s", stage.index, folder)
        failpoint("after_export")


    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Delete what isn't kept, once a stage is under way."""
        if batch_idx == 0:
            self._remove(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Delete what isn't kept beside M_T."""
        self._remove(trainer, pl_module)

    def _remove(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        keep, reference = self.keep_last, pl_module.record.reference
        if keep is None or trainer.fast_dev_run or not pl_module.record.entered:
            return
        if gone := from_first_rank(lambda: remove_models(run_dir(trainer), keep, reference)):
            log.info("deleted, because `keep_last` of StageExport is %d: %s", keep, ", ".join(gone))


def _is_there(run_dir: Path, stage: Stage, digest: str) -> bool:
    ledger = Ledger.read(run_dir)
    return ledger is not None and ledger.adopts(run_dir, stage.index, digest)


def exporter(trainer: pl.Trainer) -> StageExport:
    """The run's StageExport, or of a subclass."""
    return next(callback for callback in trainer.callbacks if isinstance(callback, StageExport))


def run_dir(trainer: pl.Trainer) -> Path:
    """Where the run leaves its files."""
    return Path(trainer.default_root_dir)
