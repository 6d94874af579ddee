"""Rank 4: the self-check at the first step of a stage: policy and reference are the same model."""

from __future__ import annotations

import lightning.pytorch as pl

from sdpo_lightning.types import PairLogps, PreferenceBatch, SelfCheckError, Stage


def compare_logps(
    pl_module: pl.LightningModule, batch: PreferenceBatch, policy: PairLogps, reference: PairLogps
) -> str:
    """How the logps `[B]` of policy and reference differ at the first step of a stage; empty if they agree.

    Args:
        pl_module: gives the reference's tolerances.
        batch: weights `[B]` say which pairs are real.
        policy: logps `[B]`.
        reference: logps `[B]`.
    """
    fp32 = str(pl_module.trainer.precision) == "32-true"
    tolerance = pl_module.reference.tolerance if fp32 else pl_module.reference.tolerance_bf16
    real = batch.weights > 0
    worst = 0.0
    for ours, theirs in ((policy.chosen, reference.chosen), (policy.rejected, reference.rejected)):
        relative = (ours - theirs).abs() / ours.abs().clamp(min=1)
        worst = max(worst, relative[real].max().item() if bool(real.any()) else 0.0)
    if worst <= tolerance:
        return ""
    return f"policy and reference logps differ by {worst:.1e} of max(1, |logp|), allowed {tolerance:.0e}"


def stop_if(trainer: pl.Trainer, stage: Stage, problem: str) -> None:
    """Stop all ranks if one has a problem. A collective.

    Raises:
        SelfCheckError: naming the stage.
    """
    if trainer.strategy.reduce_boolean_decision(bool(problem), all=False):
        raise SelfCheckError(
            f"self-check at the first step of stage {stage.index} {stage.name!r}: "
            f"{problem or 'another rank failed it'}"
        )
