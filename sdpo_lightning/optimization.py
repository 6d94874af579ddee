"""Rank 4: an optimizer and a schedule of each stage's own; gradients measured once, clipped, freed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from sdpo_lightning.casts import CASTS
from sdpo_lightning.schedules import ScheduleName, learning_rate_factor, warmup_steps
from sdpo_lightning.types import ConfigurationError, Stage


class StageOptimization(pl.LightningModule):
    """The half of the module that steps.

    Args:
        optimizer: made afresh at the start of every stage.
        lr_scheduler: shape of the learning rate within a stage.
        warmup_ratio: share of a stage's optimizer steps in linear warm-up.

    Raises:
        ConfigurationError: a number outside its range.
    """

    def __init__(self, optimizer: OptimizerCallable, lr_scheduler: ScheduleName, warmup_ratio: float) -> None:
        super().__init__()
        if not 0 <= warmup_ratio <= 1:
            raise ConfigurationError(f"`model.warmup_ratio` is {warmup_ratio}, expected within [0, 1]")
        self.make_optimizer = optimizer
        self.schedule: ScheduleName = lr_scheduler
        self.warmup_ratio = warmup_ratio
        self.stage: Stage | None = None
        self.grad_norm = float("nan")
        self.learning_rate = float("nan")

    def configure_optimizers(self) -> dict[str, Any]:
        """A fresh optimizer and schedule; called again at each stage boundary.

        The schedule looks the stage up at each call: when Lightning first calls this, the plan isn't made yet.
        """
        optimizer = self.make_optimizer(self.trainable())
        scheduler = LambdaLR(optimizer, self._learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def trainable(self) -> list[nn.Parameter]:
        """What the optimizer steps on; the reference isn't registered, so it is never among them."""
        return [p for p in self.parameters() if p.requires_grad]

    def _learning_rate_factor(self, step: int) -> float:
        # Before the first stage only step 0 is asked for, which doesn't depend on the stage's length.
        num_steps = self.stage.num_steps if self.stage is not None else 10**6
        return learning_rate_factor(self.schedule, step, num_steps, warmup_steps(num_steps, self.warmup_ratio))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Measure the gradient before it is clipped, and stop a run before a non-finite step.

        Raises:
            FloatingPointError: the gradient isn't finite; no weight has changed.
        """
        CASTS.release()
        grads = [p.grad for p in self.trainable() if p.grad is not None]
        self.grad_norm = nn.utils.get_total_norm(grads).item()
        self.learning_rate = optimizer.param_groups[0]["lr"]
        if not math.isfinite(self.grad_norm):
            raise FloatingPointError(
                f"gradient norm {self.grad_norm} before optimizer step {self.trainer.global_step + 1}; "
                "no weight was changed. Lower the learning rate or look at the pairs of this step"
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
        optimizer: torch.optim.Optimizer,
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
