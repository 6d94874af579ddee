"""Rank 1: learning rates of one stage, as pure functions of the stage-local step."""

from __future__ import annotations

import math

from sdpo_lightning.types import ScheduleName


def warmup_steps(num_steps: int, warmup_ratio: float) -> int:
    """Warm-up steps of a stage: `ceil(ratio * steps)`, as transformers counts them.

    None where the stage has one step: that of a warm-up's first step is 0, so nothing would be trained.

    Args:
        num_steps: optimizer steps of the stage.
        warmup_ratio: share of them, in [0, 1].
    """
    return math.ceil(warmup_ratio * num_steps) if num_steps > 1 else 0


def learning_rate_factor(name: ScheduleName, step: int, num_steps: int, warmup: int) -> float:
    """Factor on the base learning rate at one optimizer step of a stage.

    Same values as the schedules of transformers, so that a stage equals one run of TRL. Defined beyond
    `num_steps` and for a warm-up as long as the stage.

    Args:
        name: shape after the warm-up.
        step: optimizer steps of this stage so far, from 0.
        num_steps: optimizer steps of the whole stage.
        warmup: steps of linear warm-up from 0.

    Returns:
        A factor in [0, 1].
    """
    if step < warmup:
        return step / warmup
    if name == "constant":
        return 1.0
    # A stage may be no longer than its warm-up.
    decay = max(1, num_steps - warmup)
    if name == "linear":
        return max(0.0, (num_steps - step) / decay)
    progress = min(1.0, (step - warmup) / decay)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
