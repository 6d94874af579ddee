"""Rank 5: do the chosen answers lose likelihood since S? DPO only asks that the rejected ones lose more."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from sdpo_lightning.objectives import DPOPLoss
from sdpo_lightning.reference import is_sft
from sdpo_lightning.run_parts import StageModule, stage_module
from sdpo_lightning.types import ConfigurationError, PairLogps, PreferenceBatch, Stage

log = logging.getLogger(__name__)


def chosen_change(policy: PairLogps, sft: PairLogps, counted: Tensor) -> Tensor:
    """Change of the chosen answers' logps since S, each per token of its answer.

    Args:
        policy: logps `[B]`.
        sft: logps of S, `[B]`.
        counted: `[B]` bool, pairs that count.

    Returns:
        `[2]` float64: the sum over the pairs (nats a token), and how many they are.
    """
    change = (policy.chosen - sft.chosen).double() / policy.chosen_lengths
    # Select, don't multiply: a filler pair may hold anything.
    return torch.stack([torch.where(counted, change, 0.0).sum(), counted.sum().double()])


class LikelihoodGuard(pl.Callback):
    """Warns, once a stage, where the chosen answers have fallen more than a set amount below S (nats a token).

    No model is kept for it. In training it looks at means over blocks of steps, of the pairs whose logps of S are
    known: from the ranking, or from a reference that is S (in stage 1, or a fixed one). At a stage's end it looks at
    the held-out pairs that `StageEvaluation` has scored, all there is with `data.order: given` from stage 2 on.

    Args:
        max_drop: nats a token; None switches it off.
        block_steps: optimizer steps of a block.

    Raises:
        ConfigurationError: a number that isn't above 0.
    """

    def __init__(self, max_drop: float | None = 0.5, block_steps: int = 20) -> None:
        for name, value in (("max_drop", max_drop), ("block_steps", block_steps)):
            if value is not None and value <= 0:
                raise ConfigurationError(f"`{name}` of LikelihoodGuard is {value}, expected above 0")
        self.max_drop = max_drop
        self.block_steps = block_steps
        # Index of the last stage that was warned of.
        self._warned = 0
        self._step = self._begin = 0
        self._sums: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """Which stage was warned of, so that a resumed run doesn't say it again."""
        return {"warned": self._warned}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take it over."""
        self._warned = state_dict["warned"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a block; the block of a run that was resumed within one is the rest of it."""
        self._step = self._begin = trainer.global_step
        self._sums.clear()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        """Count a micro-batch; at a block's end compare. All ranks come to it at the same steps."""
        pl_module = stage_module(pl_module)
        if self.max_drop is None:
            return
        self._count(pl_module, batch)
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._step - self._begin >= self.block_steps:
            self._compare(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A block ends with its pass, so that none reaches into another stage."""
        pl_module = stage_module(pl_module)
        if self.max_drop is not None and trainer.global_step > self._begin:
            self._compare(trainer, pl_module)

    def _count(self, pl_module: StageModule, batch: PreferenceBatch) -> None:
        if pl_module.last_logps is None:
            return
        policy, reference = pl_module.last_logps
        if is_sft(pl_module.reference, pl_module.record.reference):
            sft, known = reference, torch.ones_like(batch.weights, dtype=torch.bool)
        elif pl_module.m0_logps is not None:
            sft, known = pl_module.m0_logps.lookup(batch.pair_id)
        else:
            return
        self._sums.append(chosen_change(policy, sft, known & (batch.weights > 0)))

    def _compare(self, trainer: pl.Trainer, pl_module: StageModule) -> None:
        sums = torch.stack(self._sums).sum(0) if self._sums else torch.zeros(2, dtype=torch.float64)
        steps, self._begin = trainer.global_step - self._begin, trainer.global_step
        self._sums.clear()
        total, count = trainer.strategy.reduce(sums.to(trainer.strategy.root_device), reduce_op="sum").tolist()
        if count:
            self._judge(pl_module, pl_module.stage_under_way, total / count, f"{round(count)} pairs of {steps} steps")

    def judge_held_out(
        self, pl_module: StageModule, stage: Stage, rows: Sequence[dict[str, Any]], m0: Sequence[dict[str, Any]]
    ) -> None:
        """Compare the held-out pairs of each source at a stage's end.

        Args:
            pl_module: what is trained.
            stage: that has ended.
            rows: of `matrix.json`, of M_t.
            m0: of M_0.
        """
        before = {row["source"]: row["chosen_logps_per_token"] for row in m0}
        for row in rows:
            if row["source"] in before:
                change = row["chosen_logps_per_token"] - before[row["source"]]
                self._judge(pl_module, stage, change, f"{row['pairs']} held-out pairs of {row['source']!r}")

    def _judge(self, pl_module: StageModule, stage: Stage, change: float, where: str) -> None:
        if self.max_drop is None or stage.index == self._warned or not change < -self.max_drop:
            return
        self._warned = stage.index
        if not pl_module.trainer.is_global_zero:
            return
        help_ = "DPOP works against it (`model.loss: sdpo_lightning.objectives.DPOPLoss`)"
        loss = None if pl_module.loss is None else pl_module.loss.of_stage(stage.index, stage.name)
        if isinstance(loss, DPOPLoss):
            help_ = f"raise DPOP's `penalty` in `model.loss`, {loss.penalty:g}"
        log.warning(
            "stage %d %r: the chosen answers have lost %.3g nats a token since S (%s), more than `max_drop` %g of "
            "LikelihoodGuard: the policy unlearns what it is to prefer; %s, or a lower learning rate, or a higher "
            "`model.beta`",
            stage.index,
            stage.name,
            -change,
            where,
            self.max_drop,
            help_,
        )
