"""Rank 6: the stage boundary.

Order at a boundary: the last epoch of stage t-1 ends and is checkpointed -> Lightning asks for the loader of
stage t -> on its first batch: export of M_{t-1} -> ledger "t-1 done" -> the reference advances -> ledger "t open" ->
fresh optimizer and schedule -> self-check -> first step. A process that ends anywhere in between goes on from that
checkpoint. The swap is keyed on the saved index of the entered stage, not on an epoch hook:
those are skipped on some resumes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import lightning.pytorch as pl
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from sdpo_lightning.backbone import CausalBackbone
from sdpo_lightning.casts import CASTS
from sdpo_lightning.checkpoint import DurableCheckpointIO
from sdpo_lightning.checks import (
    check_disks,
    check_links,
    check_optimizers,
    check_run_dir,
    check_start,
    check_strategy,
    check_trainer,
    check_vocabulary,
)
from sdpo_lightning.data.curriculum import stage_of_epoch
from sdpo_lightning.data.endings import last_epoch
from sdpo_lightning.data.pair_lists import data_of
from sdpo_lightning.difficulty_reference import score_by_reference
from sdpo_lightning.export import exporter
from sdpo_lightning.failpoints import failpoint
from sdpo_lightning.fork import Fork, adopt
from sdpo_lightning.loop_progress import go_by_epochs_
from sdpo_lightning.policy_start import start_policy_
from sdpo_lightning.random_states import restore_random_states
from sdpo_lightning.ranks import from_first_rank
from sdpo_lightning.reference_start import check_reference
from sdpo_lightning.run_lock import RunLock
from sdpo_lightning.run_parts import StageModule, is_try, run_dir, stage_module
from sdpo_lightning.run_state import close_stage, is_complete, leaves_files, lock_run, open_stage, take_up
from sdpo_lightning.scoring import evaluation_inputs, read_m0, score_by_m0, set_layout, stage_inputs
from sdpo_lightning.self_check import check_weights, compare_logps, stop_if
from sdpo_lightning.stage_judge import JudgedStages, write_curriculum
from sdpo_lightning.stage_weights import LastOfStage, StageWeights
from sdpo_lightning.stop_rule import StopRule
from sdpo_lightning.types import ConfigurationError, PreferenceBatch, Stage

log = logging.getLogger(__name__)

# What Lightning sets when `max_epochs` isn't given.
_UNSET_EPOCHS = (None, -1, 1000)


class StageTransition(JudgedStages):
    """Ranks the sources before stage 1 and makes the just-trained weights the new reference at each boundary.

    Args:
        stop: ends a stage before its plan does, by what its validations say.
        stage_weights: which weights of a stage become M_t, such as `BestOfStage`; None is the last ones.
    """

    # The first batch of a stage, until its logps are compared.
    _unchecked: PreferenceBatch | None = None
    # Optimizer steps that the reference has been told of.
    _steps_told = 0

    def __init__(self, stop: StopRule | None = None, stage_weights: StageWeights | None = None) -> None:
        super().__init__(stop, stage_weights if stage_weights is not None else LastOfStage())
        self._lock = RunLock()

    def should_advance(self, trainer: pl.Trainer, stage: Stage) -> bool:
        """Whether the reference becomes M_{t-1} at the start of stage t > 1. Override to hold it back."""
        return True

    # ---- before training

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Fit the Trainer to the plan. Runs after the data is checked and before any weights load.

        Raises:
            ConfigurationError: Trainer settings that would cut or mix the stages.
        """
        pl_module = stage_module(pl_module)
        check_strategy(trainer, pl_module)
        for path in filter(None, (pl_module.model_name_or_path, data_of(trainer).difficulty_reference)):
            from_first_rank(partial(check_vocabulary, data_of(trainer).tokenizer, path))
        from_first_rank(lambda: check_links(run_dir(trainer)))
        check_disks(trainer)
        check_start(pl_module)
        check_reference(trainer, pl_module)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = DurableCheckpointIO()
        # Inference tensors, of a reference or of gathered shards, can't be trained or copied into later.
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False
        if stage != "fit":
            return
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        go_by_epochs_(trainer.fit_loop)
        # Before the first stage there is no reference to validate against.
        trainer.num_sanity_val_steps = 0
        if not data_of(trainer).val_names:
            trainer.limit_val_batches = 0
        check_trainer(trainer)
        self.judge.check(trainer)
        if pl_module.fork is not None and trainer.ckpt_path is None:
            from_first_rank(partial(pl_module.fork.check, run_dir(trainer)))
        if data_of(trainer).staging.knows_epochs:
            self._set_epochs(trainer, data_of(trainer).total_epochs())
        if leaves_files(trainer):
            lock_run(trainer, self._lock)

    @staticmethod
    def _set_epochs(trainer: pl.Trainer, total: int) -> None:
        given, planned = trainer.fit_loop.max_epochs, data_of(trainer).total_epochs()
        if is_try(trainer):
            return
        # Where a stage has ended early, the total is below what was planned.
        if given not in (*_UNSET_EPOCHS, planned, total):
            raise ConfigurationError(
                f"`trainer.max_epochs` is {given}, but the plan has {planned} epochs over all stages; leave it out "
                "and set `data.epochs_per_stage`"
            )
        trainer.fit_loop.max_epochs = total

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the logps of this model, and rank the sources by M_0 unless the run is resumed."""
        pl_module = stage_module(pl_module)
        check_run_dir(trainer, pl_module)
        data = data_of(trainer)
        set_layout(trainer, pl_module)
        if trainer.ckpt_path is not None:
            # So that a finished run takes no turn.
            return self._set_epochs(trainer, last_epoch(data.stages()))
        rival = None
        if data.needs_ranking and not is_try(trainer):
            rival = score_by_reference(trainer, pl_module)
            score_by_m0(trainer, pl_module)
        data.rank(pl_module.m0_logps, rival)
        if pl_module.fork is not None:
            assert isinstance(pl_module.fork, Fork)
            adopt(trainer, pl_module, pl_module.fork)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After every restore: take up the plan, and the reference of a stage that is under way."""
        pl_module = stage_module(pl_module)
        data = data_of(trainer)
        stages = data.stages()
        self._set_epochs(trainer, last_epoch(stages))
        self.judge.weights.go_on(trainer)
        write_curriculum(trainer)
        record, self._steps_told = pl_module.record, trainer.global_step
        if trainer.ckpt_path is not None and leaves_files(trainer):
            take_up(trainer, pl_module, stages)
        if record.entered:
            read_m0(trainer, pl_module)
            pl_module.stage = stages[record.entered - 1]
            if trainer.ckpt_path is not None or self._is_behind(trainer, pl_module, stages[record.entered]):
                inputs = stage_inputs(trainer, pl_module, pl_module.stage_under_way)
                pl_module.reference.restore(_reads(trainer, pl_module), pl_module.stage_under_way, inputs)
        if pl_module.random_states is not None:
            restore_random_states(pl_module.random_states)
            pl_module.random_states = None

    def _is_behind(self, trainer: pl.Trainer, pl_module: StageModule, following: Stage) -> bool:
        """In a fork, at a stage's end: whether the reference of the next stage is another model than the policy."""
        if not self.should_advance(trainer, following):
            return True
        index = pl_module.reference.model_index(following)
        if index == following.index - 1:
            return False
        pl_module.record.reference = index
        return True

    # ---- the boundary

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        """On the first batch of a stage, enter it."""
        pl_module = stage_module(pl_module)
        stage = stage_of_epoch(data_of(trainer).stages(), trainer.current_epoch)
        if stage.index != pl_module.record.entered:
            self._enter(trainer, pl_module, stage, batch)

    def _enter(
        self, trainer: pl.Trainer, pl_module: StageModule, stage: Stage, batch: PreferenceBatch
    ) -> None:
        record = pl_module.record
        assert stage.index == record.entered + 1, f"stage {stage.index} follows stage {record.entered}"
        if stage.index > 1:
            _leave(trainer, pl_module, pl_module.stage_under_way)
        advances = stage.index == 1 or self.should_advance(trainer, stage)
        inputs = stage_inputs(trainer, pl_module, stage)
        if advances:
            pl_module.reference.advance(pl_module.trained, stage, inputs)
            record.reference = pl_module.reference.model_index(stage)
        else:
            pl_module.reference.stay(stage, inputs)
        start = start_policy_(pl_module, stage)
        failpoint("after_advance")
        record.entered = stage.index
        pl_module.stage = stage
        self.judge.begin_stage()
        if pl_module.loss is not None:
            pl_module.loss.start_stage()
        if leaves_files(trainer):
            open_stage(trainer, pl_module, stage)
            failpoint("after_open")
            if data_of(trainer).staging.ranked_by == "previous":
                write_curriculum(trainer)
        if stage.index > 1 or stage.num_steps == 1 or stage.settings.given():
            # Those of stage 1 are made before the plan is, as for a stage of many steps without settings.
            pl_module.zero_grad(set_to_none=True)
            trainer.strategy.setup_optimizers(trainer)
        check_optimizers(trainer, pl_module)
        check_weights(trainer, pl_module, stage, start)
        pl_module.last_logps = None
        failpoint("after_swap")
        # The first step's own logps are compared before its backward pass: no forward for the check alone.
        same = record.reference == start and pl_module.reference.starts_at_policy
        self._unchecked = batch if advances and same else None
        log.info("stage %d %r: %d pairs, %d steps", stage.index, stage.name, len(stage.pair_ids), stage.num_steps)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """On the first step of a stage: policy and reference must give the same logps.

        Raises:
            SelfCheckError: they don't.
        """
        pl_module = stage_module(pl_module)
        batch, self._unchecked = self._unchecked, None
        if batch is None:
            return
        problem, logps = "", pl_module.last_logps
        differs = logps is None or bool(compare_logps(pl_module, batch, *logps))
        # All ranks or none: a forward of a sharded model is a collective.
        if trainer.strategy.reduce_boolean_decision(differs, all=False):
            # Dropout, say, shifts the policy in training mode; without it, does it agree?
            pl_module.trained.eval()
            policy = pl_module.score(pl_module.trained, batch)
            pl_module.trained.train()
            problem = compare_logps(pl_module, batch, policy, pl_module.reference.logps(batch))
        stop_if(trainer, pl_module.stage_under_way, problem)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        """Tell the reference of the micro-batch, and of the optimizer step if there was one, before it is saved."""
        pl_module = stage_module(pl_module)
        if pl_module.last_logps is not None:
            pl_module.reference.observe(batch, *pl_module.last_logps)
        if trainer.global_step != self._steps_told:
            self._steps_told = trainer.global_step
            pl_module.reference.after_step(pl_module.trained)
            self.end_if_due(trainer, pl_module)

    # ---- the end, and the other verbs

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """An interrupted step leaves no copies of weights behind."""
        CASTS.release()
        self._lock.release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Free the run directory."""
        self._lock.release()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export M_T if the plan is complete; else say where the run stopped."""
        pl_module = stage_module(pl_module)
        if is_try(trainer):
            return
        stages = data_of(trainer).stages()
        if is_complete(trainer) and trainer.is_last_batch:
            _leave(trainer, pl_module, stages[-1])
            return
        stage = pl_module.stage or stages[0]
        log.warning(
            "stopped inside stage %d %r at step %d: M_%d is not exported; a resumed run goes on there",
            stage.index,
            stage.name,
            trainer.global_step,
            stage.index,
        )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A run that ended between its last checkpoint and the export of M_T is resumed without a step: export."""
        pl_module = stage_module(pl_module)
        data = data_of(trainer)
        if trainer.ckpt_path is None or is_try(trainer) or not data.is_ranked:
            return
        stages = data.stages()
        if pl_module.stage is None and is_complete(trainer):
            take_up(trainer, pl_module, stages)
            _leave(trainer, pl_module, stages[-1])
            log.info("already complete: %s", run_dir(trainer))
        elif pl_module.stage is None:
            log.warning("no step was taken: `trainer.max_steps` or `trainer.max_time` is used up; raise it to go on")

    def _prepare_evaluation(self, trainer: pl.Trainer, pl_module: StageModule, ids: list[int]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            return
        set_layout(trainer, pl_module)
        read_m0(trainer, pl_module)
        index = max(pl_module.record.entered, 1)
        stage = pl_module.evaluated = Stage(index, "evaluation", ids, (1,), 0, data_of(trainer).settings_of(index))
        inputs = evaluation_inputs(trainer, pl_module, ids)
        pl_module.reference.restore(_reads(trainer, pl_module), stage, inputs)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Outside of `fit`: load the reference that belongs to the policy's stage."""
        pl_module = stage_module(pl_module)
        super().on_validation_start(trainer, pl_module)
        self._prepare_evaluation(trainer, pl_module, data_of(trainer).val_ids())

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Load the reference that belongs to the policy's stage."""
        pl_module = stage_module(pl_module)
        self._prepare_evaluation(trainer, pl_module, data_of(trainer).val_ids())

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Load the reference that belongs to the policy's stage."""
        pl_module = stage_module(pl_module)
        data = data_of(trainer)
        self._prepare_evaluation(trainer, pl_module, data.train_ids() + data.val_ids())


def _reads(trainer: pl.Trainer, pl_module: StageModule) -> Callable[[], CausalBackbone]:
    """What a reference is restored by; only one that holds an adapter is given that in place of a whole model."""
    return cast(Callable[[], CausalBackbone], partial(pl_module.load_reference_weights, run_dir(trainer)))


def _leave(trainer: pl.Trainer, pl_module: StageModule, stage: Stage) -> None:
    exporter(trainer).export(trainer, pl_module, stage)
    if leaves_files(trainer):
        close_stage(trainer, pl_module, stage)
        failpoint("after_ledger")
        exporter(trainer).publish(trainer, pl_module, stage)
