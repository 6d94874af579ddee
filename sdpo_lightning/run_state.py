"""Rank 5: what a run commits to its ledger, and how a resumed run takes it up again."""

from __future__ import annotations

import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from sdpo_lightning.data.pair_lists import data_of
from sdpo_lightning.files import file_digest, sweep
from sdpo_lightning.ledger import LEDGER, Ledger, LedgerStage, Weights, is_intact
from sdpo_lightning.random_states import collect_random_states, states_path, write_random_states
from sdpo_lightning.ranks import from_first_rank
from sdpo_lightning.run_lock import RunLock
from sdpo_lightning.run_parts import StageModule, epochs_processed, is_try, run_dir
from sdpo_lightning.types import ConfigurationError, Stage, StageRecord

log = logging.getLogger(__name__)


def leaves_files(trainer: pl.Trainer) -> bool:
    """Whether this is a run: not a try with `fast_dev_run`, not the verb `rank`."""
    return not is_try(trainer) and bool(trainer.limit_train_batches)


def is_complete(trainer: pl.Trainer) -> bool:
    """Whether the last pass of the last stage is done; after a stop within it that is to be asked of its last batch."""
    last = data_of(trainer).stages()[-1]
    return epochs_processed(trainer) >= last.first_epoch + last.epochs


def has_last_model(trainer: pl.Trainer, pl_module: StageModule) -> bool:
    """Whether this is a run whose M_T is exported."""
    data = data_of(trainer)
    return leaves_files(trainer) and data.is_ranked and len(data.stages()) in pl_module.record.digests


def run_plan(trainer: pl.Trainer, pl_module: StageModule) -> dict[str, Any]:
    """All that a resumed run must agree on, as plain values."""
    return data_of(trainer).plan().values() | pl_module.settings()


def lock_run(trainer: pl.Trainer, lock: RunLock) -> None:
    """Make sure that no other process uses the run directory, and remove what a dead one was writing. A collective.

    Raises:
        ConfigurationError: one does.
        OSError: the directory isn't writable.
    """

    def take() -> None:
        lock.take(run_dir(trainer))
        sweep(run_dir(trainer))

    from_first_rank(take)


def open_stage(trainer: pl.Trainer, pl_module: StageModule, stage: Stage) -> None:
    """Commit that a stage has begun. A collective."""
    plan = run_plan(trainer, pl_module)

    def commit() -> None:
        ledger = Ledger.read(run_dir(trainer)) if stage.index > 1 else None
        if ledger is None:
            ledger = Ledger({}, [], [])
        ledger.take_plan(plan)
        ledger.s_sha256 = pl_module.record.digests[0]
        ledger.checkpoints = _checkpoint_folders(trainer)
        del ledger.stages[stage.index - 1 :]
        ledger.stages.append(_entry(trainer, pl_module.record, stage, pl_module.record.reference))
        ledger.write(run_dir(trainer))

    from_first_rank(commit)


def close_stage(trainer: pl.Trainer, pl_module: StageModule, stage: Stage) -> None:
    """Commit that M_t is written. A collective."""
    digest, folder = pl_module.record.digests[stage.index], pl_module.record.folders[stage.index]
    # A finished run that is taken up again hasn't restored them.
    states = pl_module.random_states or collect_random_states()

    def commit() -> None:
        ledger = Ledger.read(run_dir(trainer))
        assert ledger is not None, "a stage ends that has not begun"
        entry = ledger.stages[stage.index - 1]
        output = Weights(folder, digest, file_digest(run_dir(trainer) / folder))
        if (entry.output, entry.status) != (output, "done"):
            # For forks, which begin here.
            write_random_states(states_path(run_dir(trainer), stage.index), states)
            entry.output, entry.status, entry.steps = output, "done", trainer.global_step
            entry.end = data_of(trainer).ends.get(stage.index)
            ledger.write(run_dir(trainer))

    from_first_rank(commit)


def take_up(trainer: pl.Trainer, pl_module: StageModule, stages: list[Stage]) -> None:
    """Compare the checkpoint with the ledger, and set aside what lies behind it. A collective.

    Raises:
        ConfigurationError: the module didn't read its part of the checkpoint.
        ResumeError: the checkpoint doesn't belong to the ledger.
    """
    if not pl_module.record.entered:
        raise ConfigurationError("no stage record was read: `on_load_checkpoint` must call `super()`'s")
    plan = run_plan(trainer, pl_module)
    finished = epochs_processed(trainer)
    done = sum(finished >= stage.first_epoch + stage.epochs for stage in stages)

    def commit() -> None:
        folder, record = run_dir(trainer), pl_module.record
        before = ledger = Ledger.read(folder)
        if ledger is None:
            log.warning("%s has no %s: it is made again from the checkpoint", folder, LEDGER)
            ledger = Ledger({}, [], _checkpoint_folders(trainer), s_sha256=record.digests[0])
            for stage in stages[: record.entered]:
                under_way = stage.index == record.entered
                held = record.reference if under_way else pl_module.reference.model_index(stage)
                ledger.stages.append(_entry(trainer, record, stage, held))
        else:
            before = deepcopy(ledger)
            ledger.check(record, pl_module.resumed_plan)
            if moved := ledger.back_to(folder, record.entered, done):
                log.warning("moved to %s, because the checkpoint is from before them: %s", folder / "stale", moved)
        ledger.accepted = list(data_of(trainer).accepted)
        ledger.take_plan(pl_module.resumed_plan)
        ledger.take_plan(plan)
        if ledger != before:
            ledger.write(folder)
        _warn_of_an_altered_reference(folder, ledger, record)

    from_first_rank(commit)


def _warn_of_an_altered_reference(folder: Path, ledger: Ledger, record: StageRecord) -> None:
    for stage in ledger.stages:
        made = stage.output
        if stage.index == record.reference and made is not None and made.folder is not None:
            if not is_intact(folder, made):
                log.warning("%s isn't as the run left it: M_%d is altered or gone", folder / made.folder, stage.index)


def _entry(trainer: pl.Trainer, record: StageRecord, stage: Stage, reference: int) -> LedgerStage:
    data = data_of(trainer)
    weights = Weights(record.folders.get(reference), record.digests[reference])
    digest = data.store.digest(list(stage.pair_ids))
    return LedgerStage(stage.index, stage.name, len(stage.pair_ids), digest, data.seed, weights)


def _checkpoint_folders(trainer: pl.Trainer) -> list[str]:
    root = run_dir(trainer).absolute()
    savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    paths = {Path(callback.dirpath).absolute() for callback in savers if callback.dirpath}
    return sorted(str(path.relative_to(root) if path.is_relative_to(root) else path) for path in paths)
