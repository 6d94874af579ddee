"""Rank 5: the self-check at the first step of a stage: policy and reference are the same model."""

from __future__ import annotations

import lightning.pytorch as pl
import torch

from sdpo_lightning.backbone import weights_digest
from sdpo_lightning.run_parts import StageModule
from sdpo_lightning.types import PairLogps, PreferenceBatch, SelfCheckError, Stage


def compare_logps(
    pl_module: StageModule, batch: PreferenceBatch, policy: PairLogps, reference: PairLogps
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
    found = []
    for ours, theirs in ((policy.chosen, reference.chosen), (policy.rejected, reference.rejected)):
        found.append(((ours - theirs).abs() / ours.abs().clamp(min=1))[real])
    # A tensor's maximum is NaN if one of its numbers is; Python's need not be.
    worst = torch.cat(found).max().item() if bool(real.any()) else 0.0
    if worst <= tolerance:
        return ""
    return f"policy and reference logps differ by {worst:.1e} of max(1, |logp|), allowed {tolerance:.0e}"


def check_weights(trainer: pl.Trainer, pl_module: StageModule, stage: Stage, start: int) -> None:
    """Stop a run whose policy isn't M_start by digest, or whose reference isn't what is recorded of it. A collective.

    Args:
        trainer: of the run.
        pl_module: has policy, reference and record.
        stage: that begins.
        start: index of the model that the policy should be.

    Raises:
        SelfCheckError: naming the stage.
    """
    problem, record = "", pl_module.record
    expected, index = record.digests[start], record.reference
    found = pl_module.reference.digest()
    said = pl_module.reference.starts_at_policy or index != stage.index - 1
    if weights_digest(pl_module.trained) != expected:
        problem = f"the policy is not M_{start}, whose sha is {expected[:12]}"
    # One of the user's own that isn't at the policy, and doesn't say what it is, is taken at its word.
    elif said and found is not None and found != record.digests[index]:
        name = f"M_{index}" if index >= 0 else "the external model"
        problem = f"the reference has sha {found[:12]}, {name} has {record.digests[index][:12]}"
    stop_if(trainer, stage, problem)


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
