"""Rank 2: losses on [B] logps, unreduced, that use no reference: of the policy's logps per token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sdpo_lightning.losses import smoothed_sigmoid
from sdpo_lightning.types import PairLogps


def _mean_logps(policy: PairLogps) -> tuple[Tensor, Tensor]:
    # As TRL: a completion that was cut away altogether counts as one token.
    return policy.chosen / policy.chosen_lengths.clamp(min=1), policy.rejected / policy.rejected_lengths.clamp(min=1)


def sft_loss(policy: PairLogps) -> Tensor:
    """-log pi(y_w | x) / |y_w|: the likelihood term of a weighted sum.

    Pang et al. 2024 (RPO, arXiv 2404.19733, Eq. 1), where |y_w| counts reasoning and answer, that is the whole
    completion. TRL's `sft` is the mean over all chosen tokens of a batch, so that a long answer weighs more; this
    follows the paper: a mean per pair.

    Args:
        policy: logps `[B]`, and lengths `[B]` tokens.

    Returns:
        `[B]` losses in nats per token.
    """
    return -_mean_logps(policy)[0]


def simpo_loss(policy: PairLogps, beta: float, margin: float = 0.5, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta * (mean logp of chosen - mean logp of rejected) - margin).

    Meng et al. 2024 (SimPO, arXiv 2405.14734, Eq. 6; the margin is its gamma). As TRL's `CPOTrainer` with
    `loss_type="simpo"` and `cpo_alpha=0`.

    Args:
        policy: logps `[B]`, and lengths `[B]` tokens.
        beta: of logps per token; its authors take 2 to 10.
        margin: least difference of the rewards that is asked for.
        label_smoothing: eps, in [0, 0.5).

    Returns:
        `[B]` losses in nats.
    """
    chosen, rejected = _mean_logps(policy)
    return smoothed_sigmoid(beta * (chosen - rejected - margin / beta), label_smoothing)


def orpo_loss(policy: PairLogps, beta: float) -> Tensor:
    """SFT loss - beta * log sigmoid(log odds of chosen - log odds of rejected), with P = exp(mean logp).

    Hong et al. 2024 (ORPO, arXiv 2403.07691, Eqs. 3, 4, 6 and 7; beta is its lambda). TRL's `ORPOTrainer` takes the
    SFT loss over prompt and answer and over all tokens of a batch; this takes it of the answer, per pair.

    Args:
        policy: logps `[B]`, and lengths `[B]` tokens.
        beta: lambda, weight of the odds ratio.

    Returns:
        `[B]` losses in nats.
    """
    chosen, rejected = _mean_logps(policy)
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return sft_loss(policy) - beta * F.logsigmoid(log_odds)


def _log1mexp(values: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0; a sure answer has no finite odds, so x stays below 0 by a rounding."""
    values = values.clamp(max=-torch.finfo(torch.float32).eps)
    small = values > -0.6931
    # Each branch sees only what it can take, or its gradient would be NaN.
    near = torch.log(-torch.expm1(torch.where(small, values, -0.5)))
    far = torch.log1p(-torch.exp(torch.where(small, -1.0, values)))
    return torch.where(small, near, far)
