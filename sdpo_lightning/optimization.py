"""Rank 5: an optimizer and a schedule of each stage's own; gradients measured once, clipped, freed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from sdpo_lightning.casts import CASTS
from sdpo_lightning.data.pair_lists import data_of
from sdpo_lightning.data.rows import row_number
from sdpo_lightning.run_parts import StageModule
from sdpo_lightning.schedules import learning_rate_factor, warmup_steps
from sdpo_lightning.types import ConfigurationError, PairLogps, PreferenceBatch, ScheduleName, Stage, StageSettings

Value = TypeVar("Value")

# Options of an optimizer that choose its kernels.
_SPEED_ONLY = ("fused", "foreach", "capturable", "differentiable")


class PerStage(Generic[Value]):
    """An attribute that reads as the value of the stage under way, where `data.stage_settings` has one.

    So a loss of one's own that reads `self.beta` follows the stages too.

    Args:
        field: of `StageSettings`.
    """

    def __init__(self, field: str) -> None:
        self._field = field

    def __get__(self, module: StageOptimization, owner: type) -> Value:
        own = getattr(module.stage_settings(), self._field)
        return module.run_values[self._field] if own is None else own

    def __set__(self, module: StageOptimization, value: Value) -> None:
        module.run_values[self._field] = value


class StageOptimization(StageModule):
    """The half of the module that steps.

    Args:
        optimizer: made afresh at the start of every stage.
        lr_scheduler: shape of the learning rate within a stage.
        warmup_ratio: share of a stage's optimizer steps in linear warm-up.

    Raises:
        ConfigurationError: a number outside its range.
    """

    beta: PerStage[float] = PerStage("beta")
    label_smoothing: PerStage[float] = PerStage("label_smoothing")
    warmup_ratio: PerStage[float] = PerStage("warmup_ratio")
    schedule: PerStage[ScheduleName] = PerStage("lr_scheduler")

    def __init__(self, optimizer: OptimizerCallable, lr_scheduler: ScheduleName, warmup_ratio: float) -> None:
        super().__init__()
        if not 0 <= warmup_ratio <= 1:
            raise ConfigurationError(f"`model.warmup_ratio` is {warmup_ratio}, expected within [0, 1]")
        # What a stage has unless it has its own: see `PerStage`.
        self.run_values: dict[str, Any] = {}
        self.stage: Stage | None = None
        # Outside of `fit`: the stage that the weights are of.
        self.evaluated: Stage | None = None
        self.make_optimizer = optimizer
        self.schedule = lr_scheduler
        self.warmup_ratio = warmup_ratio
        self.grad_norm = float("nan")
        # (pair ids, which of them aren't finite) of each micro-batch of the step.
        self._watched: list[tuple[Tensor, Tensor]] = []
        self.learning_rate = float("nan")

    def stage_settings(self) -> StageSettings:
        """What the stage under way has to itself."""
        stage = self.stage or self.evaluated
        return StageSettings() if stage is None else stage.settings

    def stage_place(self) -> tuple[int, str]:
        """Index and name of the stage under way, or of the one that the weights are of."""
        stage = self.stage or self.evaluated
        index = 1 if stage is None else stage.index
        return index, data_of(self.trainer).name_of(index)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """A fresh optimizer and schedule; called again at each stage boundary.

        The schedule looks the stage up at each call: when Lightning first calls this, the plan isn't made yet.
        """
        optimizer = self.make_optimizer(self.trainable())
        if (lr := self.stage_settings().lr) is not None:
            # Before the schedule takes it for the height that it scales.
            for group in optimizer.param_groups:
                group["lr"] = lr
        scheduler = LambdaLR(optimizer, self._learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def settings(self) -> dict[str, Any]:
        """Plain values that a resumed run must agree on: optimizer and schedule."""
        probe = self.make_optimizer([nn.Parameter(torch.zeros(2, 2))])
        given = {k: _plain(v) for k, v in probe.defaults.items() if k not in _SPEED_ONLY}
        return {
            "model.optimizer": type(probe).__name__,
            **{f"model.optimizer.{key}": value for key, value in given.items()},
            **{f"model.{field}": value for field, value in self.run_values.items()},
        }

    def trainable(self) -> list[nn.Parameter]:
        """What the optimizer steps on; the reference isn't registered, so it is never among them."""
        return [p for p in self.parameters() if p.requires_grad]

    def _learning_rate_factor(self, step: int) -> float:
        # Before the first stage only step 0 is asked for, which is the same for all lengths but 1: then it's made anew.
        num_steps = self.stage.num_steps if self.stage is not None else 10**6
        return learning_rate_factor(self.schedule, step, num_steps, warmup_steps(num_steps, self.warmup_ratio))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Measure the gradient before it is clipped, and stop a run before a non-finite step.

        Raises:
            FloatingPointError: gradient, loss or logps aren't finite; no weight has changed.
        """
        CASTS.release()
        grads = [p.grad for p in self.trainable() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        # torch 2.9 leaves that of shards unsummed over the ranks, and `item` gives each rank its own part.
        self.grad_norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        self.learning_rate = optimizer.param_groups[0]["lr"]
        watched, self._watched = self._watched, []
        stops = not math.isfinite(self.grad_norm) or any(bool(bad.any()) for _, bad in watched)
        if self.trainer.strategy.reduce_boolean_decision(stops, all=False):
            raise FloatingPointError(self._not_finite(watched))

    def watch(self, batch: PreferenceBatch, losses: Tensor, *logps: PairLogps) -> None:
        """Note which pairs of a micro-batch aren't finite; asked for before the optimizer step.

        Args:
            batch: of B pairs.
            losses: `[B]`.
            logps: of the policy and of the reference, each `[B]`.
        """
        values = torch.stack([losses.detach(), *(t.detach() for side in logps for t in (side.chosen, side.rejected))])
        self._watched.append((batch.pair_id, ~values.isfinite().all(0) & (batch.weights > 0)))

    def _not_finite(self, watched: list[tuple[Tensor, Tensor]]) -> str:
        """What to say of a step that isn't taken."""
        ids = [i for pair_id, bad in watched for i in pair_id[bad].tolist()]
        what = "loss or logps aren't finite" if ids else f"gradient norm {self.grad_norm}"
        ids = ids or [i for pair_id, _ in watched for i in pair_id.tolist()]
        data = data_of(self.trainer)
        pairs = [f"{i} ({data.source_of(i)} row {row_number(i)})" for i in ids[:8]]
        more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
        return (
            f"{what} before optimizer step {self.trainer.global_step + 1}; no weight was changed. Pairs: "
            f"{', '.join(pairs)}{more}. Lower the learning rate or look at these pairs; a checkpoint of before stays"
        )

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm that was just measured; Lightning's own way refuses fused optimizers and measures again."""
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(self.trainable(), gradient_clip_val)
        else:
            norm = torch.tensor(self.grad_norm, device=self.device)
            nn.utils.clip_grads_with_norm_(self.trainable(), gradient_clip_val, norm)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step, and free the gradients: at the height of the next forward pass they would stand idle."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad(set_to_none=True)

    def on_train_start(self) -> None:
        """Forget what an interrupted run may have left."""
        CASTS.release()

    def on_train_end(self) -> None:
        """Training may end within an accumulation."""
        CASTS.release()


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, int | float | str | None) else str(value)
