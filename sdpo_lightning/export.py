"""Rank 4: the export of M_t."""

from __future__ import annotations

import logging
from pathlib import Path

import lightning.pytorch as pl

from sdpo_lightning.backbone import weights_digest
from sdpo_lightning.failpoints import failpoint
from sdpo_lightning.hf_folder import save_hf, save_merged
from sdpo_lightning.ledger import Ledger
from sdpo_lightning.ranks import from_first_rank
from sdpo_lightning.types import Stage

log = logging.getLogger(__name__)


class StageExport(pl.Callback):
    """Writes M_t as a Hugging Face folder, `stages/0t-<stage name>`; with `model.lora` an adapter folder."""

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
        found = from_first_rank(lambda: _adopted(run_dir(trainer), stage, digest))
        # A parent's folder is only read.
        if found is not None and (not merges or Path(found).is_absolute() or from_first_rank(merged.is_dir)):
            pl_module.record.folders[stage.index] = found
            log.info("M_%d is there already, in %s", stage.index, found)
            return
        failpoint("before_export")
        save_hf(pl_module.policy, target, tokenizer)
        if merges:
            save_merged(pl_module.policy, merged, tokenizer)
        log.info("M_%d written to %s", stage.index, folder)
        failpoint("after_export")


def _adopted(run_dir: Path, stage: Stage, digest: str) -> str | None:
    ledger = Ledger.read(run_dir)
    return None if ledger is None else ledger.adopts(run_dir, stage.index, digest)


def exporter(trainer: pl.Trainer) -> StageExport:
    """The run's StageExport, or of a subclass."""
    return next(callback for callback in trainer.callbacks if isinstance(callback, StageExport))


def run_dir(trainer: pl.Trainer) -> Path:
    """Where the run leaves its files."""
    return Path(trainer.default_root_dir)
