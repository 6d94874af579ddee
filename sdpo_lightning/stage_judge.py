"""Rank 5: what the validations of a stage decide: whether it ends, and which of its weights are kept."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from sdpo_lightning.data.endings import last_epoch
from sdpo_lightning.data.pair_lists import data_of
from sdpo_lightning.divergences import k2_sums
from sdpo_lightning.files import write_json
from sdpo_lightning.loop_progress import end_pass_
from sdpo_lightning.ranks import from_every_rank, from_first_rank
from sdpo_lightning.run_parts import StageModule, callbacks_of, is_try, run_dir, stage_module, val_check_is_timed
from sdpo_lightning.stage_weights import LastOfStage, StageWeights
from sdpo_lightning.stop_rule import StopRule, StopState, check_judged, judge, monitored
from sdpo_lightning.types import ConfigurationError, PreferenceBatch, Stage

log = logging.getLogger(__name__)

STOP, WEIGHTS = "`stop` of StageTransition", "`stage_weights` of StageTransition"


class StageJudge:
    """Judges the validations of the stage under way.

    Args:
        stop: when a stage ends early; None is never.
        weights: which of its weights are kept.

    Attributes:
        reason: why the stage ends with the optimizer step under way; "" while it goes on.
    """

    def __init__(self, stop: StopRule | None, weights: StageWeights) -> None:
        self.stop = stop
        self.weights = weights
        self.reason = ""
        self._state = StopState()
        # (sum, completions) of each batch of a validation.
        self._distances: list[Tensor] = []

    @property
    def judges(self) -> bool:
        """Whether validations decide anything."""
        return self.stop is not None or self._chooses

    @property
    def _chooses(self) -> bool:
        return not isinstance(self.weights, LastOfStage)

    def settings(self) -> dict[str, Any]:
        """Plain values that a resumed run must agree on."""
        stop = None if self.stop is None else self.stop.settings()
        weights = self.weights.settings() if self._chooses else None
        return {"StageTransition.stop": stop, "StageTransition.stage_weights": weights}

    def check(self, trainer: pl.Trainer) -> None:
        """Refuse what no validation will say, before any weights are loaded.

        Raises:
            ConfigurationError: with what to set.
        """
        self.weights.check(trainer)
        if not self.judges or is_try(trainer):
            return
        data = data_of(trainer)
        held_out = data.val_names if trainer.limit_val_batches else []
        groups = data.staging.judged_groups
        monitors = [] if self.stop is None else [(STOP, None if self.stop.patience is None else self.stop.monitor)]
        if self.weights.monitor is not None:
            monitors.append((WEIGHTS, self.weights.monitor))
        for where, monitor in monitors:
            check_judged(where, monitor, groups, held_out)
            timed = val_check_is_timed(trainer)
            interval = "a time" if timed else trainer.val_check_interval
            check_interval(where, interval, max(data.staging.epochs(data.staging.names())))

    # ---- the validations of a stage

    def begin_stage(self) -> None:
        """Judge anew."""
        self.reason, self._state = "", StopState()
        self.weights.begin_stage()

    def begin_validation(self) -> None:
        """Add up anew."""
        self._distances.clear()

    def observe(self, pl_module: StageModule, batch: PreferenceBatch) -> None:
        """Add up a batch of held-out pairs."""
        if self.stop is not None and self.stop.max_kl is not None and pl_module.last_logps is not None:
            self._distances.append(k2_sums(batch.weights, *pl_module.last_logps))

    def after_validation(self, trainer: pl.Trainer, pl_module: StageModule) -> None:
        """Judge, the same on all ranks. A collective.

        Raises:
            ConfigurationError: what is monitored was never logged.
        """
        if self._chooses:
            monitor = self.weights.monitor
            value = None if monitor is None else self._value(trainer, pl_module.stage_under_way, monitor, WEIGHTS)
            self.weights.after_validation(trainer, pl_module, value)
        if self.stop is None or self.reason:
            return
        value = kl = None
        if self.stop.patience is not None:
            value = self._value(trainer, pl_module.stage_under_way, self.stop.monitor, STOP)
        if self.stop.max_kl is not None:
            kl = held_out_kl(self._distances)
        self._state, self.reason = judge(self.stop, self._state, value, kl)
        log.info(
            "stage %d, step %d: %s%s%s",
            pl_module.stage_under_way.index,
            trainer.global_step,
            "" if value is None else f"{self.stop.monitor} {value:.6g}, {self._state.waited} without improvement",
            "" if kl is None else f" KL {kl:.4g}",
            f": the stage ends, {self.reason}" if self.reason else "",
        )

    @staticmethod
    def _value(trainer: pl.Trainer, stage: Stage, monitor: str, where: str) -> float:
        data = data_of(trainer)
        names = dict.fromkeys(data.source_of(index << 40) for index in sorted({i >> 40 for i in stage.pair_ids}))
        sources = {name: len(data.reports[name].val_ids) for name in names if name in data.val_names}
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        # A metric that isn't reduced may differ between ranks.
        return from_first_rank(lambda: monitored(monitor, sources, metrics, where))

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; nothing where nothing is judged."""
        if not self.judges:
            return {}
        return {"stop": asdict(self._state), "weights": self.weights.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what a checkpoint holds."""
        if state:
            self._state = StopState(**state["stop"])
            self.weights.load_state_dict(state["weights"])


def held_out_kl(sums: list[Tensor]) -> float:
    """Distance of the policy from its reference on held-out completions, over all ranks; NaN without any.

    The mean over the 2B completions y of all held-out pairs, chosen and rejected, of
    (log pi(y | x) - log pi_ref(y | x))^2 / 2, summed logps, in nats: Schulman's k2
    (http://joschu.net/blog/kl-approx.html), as `KLBoundReference` has it of training pairs. The completions are the
    data's and not drawn from the policy, so it is a distance on the data rather than KL(pi || pi_ref).

    Args:
        sums: `[2]` each: `k2_sums` of the batches of this rank.
    """
    own = torch.stack(sums).sum(0).tolist() if sums else [0.0, 0.0]
    total, count = (sum(column) for column in zip(*from_every_rank(own), strict=True))
    return total / count if count else float("nan")


def check_interval(where: str, interval: Any, most_epochs: int) -> None:
    """Refuse validations that come too late to decide anything, or by the clock.

    Args:
        where: names the setting.
        interval: `trainer.val_check_interval`; None is 1.0, and what is no number is a time.
        most_epochs: passes of the stage that has most.

    Raises:
        ConfigurationError: with what to set.
    """
    if interval is not None and not isinstance(interval, int | float):
        raise ConfigurationError(
            f"{where} with a `trainer.val_check_interval` of time: where a stage ends would depend on the machine; "
            "give a number of batches, or a share such as 0.25"
        )
    if repr(interval) in ("None", "1.0") and most_epochs == 1:
        raise ConfigurationError(
            f"{where} is judged after validations, and with one pass a stage the only one is at its end: set "
            "`trainer.val_check_interval` to a number of batches, or to a share such as 0.25"
        )


class JudgedStages(pl.Callback):
    """The half of StageTransition that ends stages by what their validations say.

    Args:
        stop: when a stage ends early; None is never.
        stage_weights: which of its weights are kept.
    """

    def __init__(self, stop: StopRule | None, stage_weights: StageWeights) -> None:
        self.judge = StageJudge(stop, stage_weights)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add up anew."""
        self.judge.begin_validation()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: PreferenceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Let the stop rule see the logps of held-out pairs."""
        pl_module = stage_module(pl_module)
        self.judge.observe(pl_module, batch)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge the stage, before this step is saved."""
        pl_module = stage_module(pl_module)
        if trainer.state.fn != TrainerFn.FITTING or is_try(trainer):
            return
        self.judge.after_validation(trainer, pl_module)
        # Between the micro-batches of a step the stage goes on to the step's end.
        if not trainer.fit_loop._should_accumulate():
            self.end_if_due(trainer, pl_module)

    def end_if_due(self, trainer: pl.Trainer, pl_module: StageModule) -> None:
        """Where the rule says so, end the stage with this step; what comes is as at a planned end."""
        data, stage = data_of(trainer), pl_module.stage_under_way
        if not self.judge.reason:
            return
        if trainer.is_last_batch and trainer.current_epoch + 1 == last_epoch([stage]):
            return
        data.end_stage(stage, trainer.fit_loop.batch_idx + 1, self.judge.reason)
        pl_module.stage = data.stages()[stage.index - 1]
        trainer.fit_loop.max_epochs = last_epoch(data.stages())
        end_pass_(trainer.fit_loop)
        taken = pl_module.stage_under_way.num_steps, stage.num_steps
        log.info("stage %d %r ends after %d of %d steps: %s", stage.index, stage.name, *taken, self.judge.reason)
        write_curriculum(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """At a stage's end: the weights that become M_t, before they are saved."""
        pl_module = stage_module(pl_module)
        stage = pl_module.stage_under_way
        if trainer.is_last_batch and trainer.current_epoch + 1 == last_epoch([stage]):
            self.judge.weights.choose_(trainer, pl_module, stage)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """What the validations of the stage under way have said."""
        return self.judge.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self.judge.load_state_dict(state_dict)


def write_curriculum(trainer: pl.Trainer) -> None:
    """Write `curriculum.json` as the plan is now, on rank 0."""
    if trainer.is_global_zero and not is_try(trainer):
        write_json(run_dir(trainer) / "curriculum.json", data_of(trainer).curriculum())


def judge_settings(trainer: pl.Trainer) -> dict[str, Any]:
    """What the run's StageTransition judges validations by: plain values."""
    return next((c.judge.settings() for c in callbacks_of(trainer) if isinstance(c, JudgedStages)), {})
