"""Rank 6: the stage boundary.

Order at a boundary: the last epoch of stage t-1 ends and is checkpointed -> Lightning asks for the loader of
stage t -> on its first batch: export of M_{t-1} -> ledger "t-1 done" -> the reference advances -> ledger "t open" ->
fresh optimizer and schedule -> self-check -> first step. A process that ends anywhere in between goes on from that
checkpoint. The swap is keyed on the saved index of the entered stage, not on an epoch hook:
those are skipped on some resumes.
"""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from sdpo_lightning.backbone import weights_digest
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
from sdpo_lightning.difficulty_reference import score_by_reference
from sdpo_lightning.export import exporter, run_dir
from sdpo_lightning.failpoints import failpoint
from sdpo_lightning.files import write_json
from sdpo_lightning.fork import adopt
from sdpo_lightning.loop_progress import go_by_epochs_
from sdpo_lightning.policy_start import start_policy_
from sdpo_lightning.random_states import restore_random_states
from sdpo_lightning.ranks import from_first_rank
from sdpo_lightning.reference_start import check_reference
from sdpo_lightning.run_lock import RunLock
from sdpo_lightning.run_state import close_stage, is_complete, leaves_files, lock_run, open_stage, take_up
from sdpo_lightning.scoring import evaluation_inputs, read_m0, score_by_m0, set_layout, stage_inputs
from sdpo_lightning.self_check import compare_logps, stop_if
from sdpo_lightning.stage_judge import JudgedStages
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
        check_strategy(trainer, pl_module)
        for path in filter(None, (pl_module.model_name_or_path, trainer.datamodule.difficulty_reference)):
            from_first_rank(lambda path=path: check_vocabulary(trainer.datamodule.tokenizer, path))
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
        trainer.reload_dataloaders_every_n_epochs = 1
        go_by_epochs_(trainer.fit_loop)
        # Before the first stage there is no reference to validate against.
        trainer.num_sanity_val_steps = 0
        if not trainer.datamodule.val_names:
            trainer.limit_val_batches = 0
        check_trainer(trainer)
        self.judge.check(trainer)
        if pl_module.fork is not None and trainer.ckpt_path is None:
            from_first_rank(lambda: pl_module.fork.check(run_dir(trainer)))
        if trainer.datamodule.staging.knows_epochs:
            self._set_epochs(trainer, trainer.datamodule.total_epochs())
        if leaves_files(trainer):
            lock_run(trainer, self._lock)

    @staticmethod
    def _set_epochs(trainer: pl.Trainer, total: int) -> None:
        given, planned = trainer.fit_loop.max_epochs, trainer.datamodule.total_epochs()
        if trainer.fast_dev_run:
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
        check_run_dir(trainer, pl_module)
        data = trainer.datamodule
        set_layout(trainer, pl_module)
        if trainer.ckpt_path is not None:
            # So that a finished run takes no turn.
            return self._set_epochs(trainer, last_epoch(data.stages()))
        rival = None
        if data.needs_ranking and not trainer.fast_dev_run:
            rival = score_by_reference(trainer, pl_module)
            score_by_m0(trainer, pl_module)
        data.rank(pl_module.m0_logps, rival)
        if pl_module.fork is not None:
            adopt(trainer, pl_module, pl_module.fork)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After every restore: take up the plan, and the reference of a stage that is under way."""
        data = trainer.datamodule
        stages = data.stages()
        self._set_epochs(trainer, last_epoch(stages))
        self.judge.weights.go_on(trainer)
        self._write_curriculum(trainer)
        record, self._steps_told = pl_module.record, trainer.global_step
        if trainer.ckpt_path is not None and leaves_files(trainer):
            take_up(trainer, pl_module, stages)
        if record.entered:
            read_m0(trainer, pl_module)
            pl_module.stage = stages[record.entered - 1]
            if trainer.ckpt_path is not None or self._is_behind(trainer, pl_module, stages[record.entered]):
                inputs = stage_inputs(trainer, pl_module, pl_module.stage)
                pl_module.reference.restore(
                    lambda: pl_module.load_reference_weights(run_dir(trainer)), pl_module.stage, inputs
                )
        if pl_module.random_states is not None:
            restore_random_states(pl_module.random_states)
            pl_module.random_states = None

    @staticmethod
    def _write_curriculum(trainer: pl.Trainer) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:
            write_json(run_dir(trainer) / "curriculum.json", trainer.datamodule.curriculum())

    def _is_behind(self, trainer: pl.Trainer, pl_module: pl.LightningModule, following: Stage) -> bool:
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
        stage = stage_of_epoch(trainer.datamodule.stages(), trainer.current_epoch)
        if stage.index != pl_module.record.entered:
            self._enter(trainer, pl_module, stage, batch)

    def _enter(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage, batch: PreferenceBatch
    ) -> None:
        record = pl_module.record
        assert stage.index == record.entered + 1, f"stage {stage.index} follows stage {record.entered}"
        if stage.index > 1:
            _leave(trainer, pl_module, pl_module.stage)
        advances = stage.index == 1 or self.should_advance(trainer, stage)
        inputs = stage_inputs(trainer, pl_module, stage)
        if advances:
            pl_module.reference.advance(pl_module.policy, stage, inputs)
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
            if trainer.datamodule.staging.ranked_by == "previous":
                self._write_curriculum(trainer)
        if stage.index > 1 or stage.settings.given():
            # Those of stage 1 are made before the plan is.
            pl_module.zero_grad(set_to_none=True)
            trainer.strategy.setup_optimizers(trainer)
        check_optimizers(trainer, pl_module)
        self._check_weights(trainer, pl_module, stage, start)
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
        batch, self._unchecked = self._unchecked, None
        if batch is None:
            return
        problem, logps = "", pl_module.last_logps
        differs = logps is None or bool(compare_logps(pl_module, batch, *logps))
        # All ranks or none: a forward of a sharded model is a collective.
        if trainer.strategy.reduce_boolean_decision(differs, all=False):
            # Dropout, say, shifts the policy in training mode; without it, does it agree?
            pl_module.policy.eval()
            policy = pl_module.score(pl_module.policy, batch)
            pl_module.policy.train()
            problem = compare_logps(pl_module, batch, policy, pl_module.reference.logps(batch))
        stop_if(trainer, pl_module.stage, problem)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        """Tell the reference of the micro-batch, and of the optimizer step if there was one, before it is saved."""
        if pl_module.last_logps is not None:
            pl_module.reference.observe(batch, *pl_module.last_logps)
        if trainer.global_step != self._steps_told:
            self._steps_told = trainer.global_step
            pl_module.reference.after_step(pl_module.policy)
            self.end_if_due(trainer, pl_module)

    @staticmethod
    def _check_weights(trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage, start: int) -> None:
        """Stop a run whose policy isn't M_start by digest, or whose reference isn't what is recorded of it."""
        problem, record = "", pl_module.record
        expected, index = record.digests[start], record.reference
        found = pl_module.reference.digest()
        said = pl_module.reference.starts_at_policy or index != stage.index - 1
        if weights_digest(pl_module.policy) != expected:
            problem = f"the policy is not M_{start}, whose sha is {expected[:12]}"
        # One of the user's own that isn't at the policy, and doesn't say what it is, is taken at its word.
        elif said and found is not None and found != record.digests[index]:
            name = f"M_{index}" if index >= 0 else "the external model"
            problem = f"the reference has sha {found[:12]}, {name} has {record.digests[index][:12]}"
        stop_if(trainer, stage, problem)

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
        if trainer.fast_dev_run:
            return
        stages = trainer.datamodule.stages()
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
        data = trainer.datamodule
        if trainer.ckpt_path is None or trainer.fast_dev_run or not data.is_ranked:
            return
        stages = data.stages()
        if pl_module.stage is None and is_complete(trainer):
            take_up(trainer, pl_module, stages)
            _leave(trainer, pl_module, stages[-1])
            log.info("already complete: %s", run_dir(trainer))
        elif pl_module.stage is None:
            log.warning("no step was taken: `trainer.max_steps` or `trainer.max_time` is used up; raise it to go on")

    def _prepare_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, ids: list[int]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            return
        set_layout(trainer, pl_module)
        read_m0(trainer, pl_module)
        index = max(pl_module.record.entered, 1)
        stage = pl_module.evaluated = Stage(index, "evaluation", ids, (1,), 0, trainer.datamodule.settings_of(index))
        inputs = evaluation_inputs(trainer, pl_module, ids)
        pl_module.reference.restore(lambda: pl_module.load_reference_weights(run_dir(trainer)), stage, inputs)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Outside of `fit`: load the reference that belongs to the policy's stage."""
        super().on_validation_start(trainer, pl_module)
        self._prepare_evaluation(trainer, pl_module, trainer.datamodule.val_ids())

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Load the reference that belongs to the policy's stage."""
        self._prepare_evaluation(trainer, pl_module, trainer.datamodule.val_ids())

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Load the reference that belongs to the policy's stage."""
        data = trainer.datamodule
        self._prepare_evaluation(trainer, pl_module, data.train_ids() + data.val_ids())


def _leave(trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
    exporter(trainer).export(trainer, pl_module, stage)
    if leaves_files(trainer):
        close_stage(trainer, pl_module, stage)
        failpoint("after_ledger")
        exporter(trainer).publish(trainer, pl_module, stage)
