"""Rank 5: the export of M_t."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from huggingface_hub import HfApi

from sdpo_lightning.backbone import weights_digest
from sdpo_lightning.card import CardFacts, CardSource, model_card, stage_metrics, use_lines
from sdpo_lightning.data.declaration import PreferenceSource
from sdpo_lightning.data.pair_lists import PairLists, data_of
from sdpo_lightning.failpoints import failpoint
from sdpo_lightning.hf_folder import save_hf, save_merged
from sdpo_lightning.ledger import Ledger
from sdpo_lightning.ranks import from_first_rank, is_first, together
from sdpo_lightning.retention import remove_models
from sdpo_lightning.run_parts import StageModule, callbacks_of, is_try, run_dir, stage_module
from sdpo_lightning.types import ConfigurationError, Stage, StageRecord
from sdpo_lightning.versions import version_of

log = logging.getLogger(__name__)


class StageExport(pl.Callback):
    """Writes M_t as a Hugging Face folder, `stages/0t-<stage name>`; with `model.lora` an adapter folder.

    Args:
        keep_last: models that stay; None keeps all. What a checkpoint or the reference needs stays beside them.
        push_to_hub: `user/name`: upload each M_t as the private repository `user/name-0t-<stage name>`. The login is
            that of `hf auth login`. A failure is a warning: it never ends the run.

    Raises:
        ConfigurationError: none would stay.
    """

    def __init__(self, keep_last: int | None = None, push_to_hub: str | None = None) -> None:
        if keep_last is not None and keep_last < 1:
            raise ConfigurationError(f"`keep_last` of StageExport is {keep_last}, expected at least 1, or none for all")
        self.keep_last = keep_last
        self.push_to_hub = push_to_hub

    def export(self, trainer: pl.Trainer, pl_module: StageModule, stage: Stage) -> None:
        """Write M_t, the policy at this moment, and record its digest.

        Args:
            trainer: gives the run directory.
            pl_module: holds the policy and the record.
            stage: the stage that has ended.
        """
        folder = Path("stages") / stage.folder_name
        digest = weights_digest(pl_module.trained)
        pl_module.record.digests[stage.index] = digest
        pl_module.record.folders[stage.index] = str(folder)
        target, tokenizer = run_dir(trainer) / folder, data_of(trainer).tokenizer
        merged = target.with_name(f"{target.name}-merged")
        merges = pl_module.lora is not None and pl_module.lora.export_merged
        found = from_first_rank(lambda: _adopted(run_dir(trainer), stage, digest))
        # A parent's folder is only read.
        if found is not None and (not merges or Path(found).is_absolute() or from_first_rank(merged.is_dir)):
            pl_module.record.folders[stage.index] = found
            log.info("M_%d is there already, in %s", stage.index, found)
            return
        failpoint("before_export")
        card = from_first_rank(lambda: model_card(_facts(trainer, pl_module, stage)))
        save_hf(pl_module.trained, target, tokenizer, card)
        if merges:
            save_merged(pl_module.trained, merged, tokenizer)
        log.info("M_%d written to %s", stage.index, folder)
        failpoint("after_export")

    def publish(self, trainer: pl.Trainer, pl_module: StageModule, stage: Stage) -> None:
        """Say how M_T is used, once the plan is complete; with `push_to_hub` upload M_t. A collective.

        Args:
            trainer: gives the run directory.
            pl_module: its record knows M_t's folder.
            stage: a finished one.
        """
        folder = run_dir(trainer) / pl_module.record.folders[stage.index]
        if stage.index == len(data_of(trainer).stages()):
            for line in use_lines(str(folder), pl_module.model_name_or_path, pl_module.lora is not None):
                log.info("  %s", line)
        # What a fork adopted is its parent's.
        if self.push_to_hub is not None and not Path(pl_module.record.folders[stage.index]).is_absolute():
            name = f"{self.push_to_hub}-{stage.folder_name}"
            together((lambda: push(folder, name)) if is_first() else None)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Delete what isn't kept, once a stage is under way."""
        pl_module = stage_module(pl_module)
        if batch_idx == 0:
            self._remove(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Delete what isn't kept beside M_T."""
        pl_module = stage_module(pl_module)
        self._remove(trainer, pl_module)

    def _remove(self, trainer: pl.Trainer, pl_module: StageModule) -> None:
        keep, reference = self.keep_last, pl_module.record.reference
        if keep is None or is_try(trainer) or not pl_module.record.entered:
            return
        if gone := from_first_rank(lambda: remove_models(run_dir(trainer), keep, reference)):
            log.info("deleted, because `keep_last` of StageExport is %d: %s", keep, ", ".join(gone))


def push(folder: Path, name: str) -> None:
    """Upload a folder as a private repository; what goes wrong is said and no more."""
    try:
        api = HfApi()
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # noqa: BLE001
        log.warning("%s wasn't pushed to the hub: %s", folder, " ".join(str(error).split()) or type(error).__name__)
    else:
        log.info("%s is on the hub, private, as %s", folder, name)


def _facts(trainer: pl.Trainer, pl_module: StageModule, stage: Stage) -> CardFacts:
    data, record, base = data_of(trainer), pl_module.record, pl_module.model_name_or_path
    indices = sorted({pair_id >> 40 for pair_id in stage.pair_ids})
    is_hub, ledger = not Path(base).exists(), Ledger.read(run_dir(trainer))
    # The ledger has it once the stage is closed, after the export.
    end = data.ends.get(stage.index)
    return CardFacts(
        index=stage.index,
        num_stages=len(data.stages()),
        stage=stage.name,
        pairs=len(stage.pair_ids),
        data_digest="" if ledger is None else ledger.stages[stage.index - 1].data,
        base=base if is_hub else Path(base).name,
        base_is_hub=is_hub,
        base_digest=record.digests[0],
        digest=record.digests[stage.index],
        reference=_reference_name(record),
        reference_digest=record.digests[record.reference],
        is_adapter=pl_module.lora is not None,
        sources=[_card_source(data, index) for index in indices],
        settings=pl_module.settings(),
        metrics=stage_metrics(run_dir(trainer) / "metrics.csv", stage.index),
        versions={name: version_of(name) for name in ("sdpo-lightning", "torch", "lightning", "transformers")},
        notes=tuple(data.accepted),
        ended="" if end is None else f"after {sum(end.epoch_steps)} steps, {end.pairs} pairs: {end.reason}",
    )


def _reference_name(record: StageRecord) -> str:
    if record.reference < 0:
        return Path(record.folders[record.reference]).name
    return f"M_{record.reference}" if record.reference else "S"


def _card_source(data: PairLists, index: int) -> CardSource:
    if index >= len(data.sources):
        return CardSource(data.made.name_of(index), "made with the model before", False)
    source: PreferenceSource = data.sources[index]
    path = str(source.path)
    is_hub = not Path(path).exists()
    return CardSource(source.name, path if is_hub else Path(path).name, is_hub)


def _adopted(run_dir: Path, stage: Stage, digest: str) -> str | None:
    ledger = Ledger.read(run_dir)
    return None if ledger is None else ledger.adopts(run_dir, stage.index, digest)


def exporter(trainer: pl.Trainer) -> StageExport:
    """The run's StageExport, or of a subclass."""
    return next(callback for callback in callbacks_of(trainer) if isinstance(callback, StageExport))
