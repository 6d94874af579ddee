"""Rank 1: preference losses on [B] logps, unreduced, that look at each answer alone or at all pairs together.

r_w and r_l are the rewards beta * log(pi / pi_ref) of chosen and rejected.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sdpo_lightning.types import PairLogps


def _log_ratios(policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected


def nca_pair_loss(policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
    """-log sigmoid(r_w) - (log sigmoid(-r_w) + log sigmoid(-r_l)) / 2.

    Chen et al. 2024 (NCA, arXiv 2402.05369, section 4.1; for two answers a prompt Table 1). As TRL's `nca_pair`.

    Args:
        policy: logps `[B]`.
        reference: logps `[B]`.
        beta: scale of the rewards.

    Returns:
        `[B]` losses in nats; 2 ln 2 where policy and reference agree.
    """
    chosen, rejected = (beta * ratio for ratio in _log_ratios(policy, reference))
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair_loss(policy: PairLogps, reference: PairLogps, beta: float, shift: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(r_w - delta) - log sigmoid(-(r_l - delta)).

    Jung et al. 2024 (BCO, arXiv 2404.04656, section 4), where delta is the mean reward. TRL 1.16's `bco_pair` has
    delta = 0, which is the default here.

    Args:
        policy: logps `[B]`.
        reference: logps `[B]`.
        beta: scale of the rewards.
        shift: delta, of the rewards.

    Returns:
        `[B]` losses in nats; 2 ln 2 where policy and reference agree and delta is 0.
    """
    chosen, rejected = (beta * ratio for ratio in _log_ratios(policy, reference))
    return -F.logsigmoid(chosen - shift) - F.logsigmoid(-(rejected - shift))


def sppo_hard_loss(policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
    """(log-ratio of chosen - 1 / (2 beta))^2 + (log-ratio of rejected + 1 / (2 beta))^2.

    Wu et al. 2024 (SPPO, arXiv 2405.00675, Eq. 4.7 with eta = 1 / beta), with the chance to win 1 and 0 instead of
    a model's estimate. As TRL's `sppo_hard`.

    Args:
        policy: logps `[B]`.
        reference: logps `[B]`.
        beta: 1 / eta.

    Returns:
        `[B]` losses; 1 / (2 beta^2) where policy and reference agree.
    """
    chosen, rejected = _log_ratios(policy, reference)
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def apo_zero_loss(policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
    """1 - sigmoid(r_w) + sigmoid(r_l): chosen up, rejected down. For chosen answers better than the model's.

    D'Oosterlinck et al. 2024 (APO, arXiv 2408.06266, Eq. 7). As TRL's `apo_zero`.

    Args:
        policy: logps `[B]`.
        reference: logps `[B]`.
        beta: scale of the rewards.

    Returns:
        `[B]` losses within [0, 2]; 1 where policy and reference agree.
    """
    chosen, rejected = _log_ratios(policy, reference)
    return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down_loss(policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
    """sigmoid(r_w) + 1 - sigmoid(r_w - r_l): both down, rejected more. For chosen answers worse than the model's.

    D'Oosterlinck et al. 2024 (APO, arXiv 2408.06266, Eq. 8, which is smaller by the constant 1). As TRL's `apo_down`.

    Args:
        policy: logps `[B]`.
        reference: logps `[B]`.
        beta: scale of the rewards.

    Returns:
        `[B]` losses within [0, 2]; 1 where policy and reference agree.
    """
    chosen, rejected = _log_ratios(policy, reference)
    return torch.sigmoid(beta * chosen) + (1 - torch.sigmoid(beta * (chosen - rejected)))


def aot_loss(policy: PairLogps, reference: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """The k-th smallest gamma of the policy against the k-th smallest of the reference, by the smoothed sigmoid loss.

    Melnyk et al. 2024 (AOT, paired, arXiv 2406.05882, section 3), by sorting. As TRL's `aot`. The distributions are
    those of one micro-batch of one rank; with one pair it is DPO.

    Args:
        policy: logps `[B]`; pairs that aren't `real` take no part in the order.
        reference: logps `[B]`.
        beta: inverse temperature.
        label_smoothing: eps, in [0, 0.5).

    Returns:
        `[B]` losses in nats, each at the pair whose gamma of the policy it holds.
    """
    return _sorted_loss(policy.gamma, reference.gamma, policy.real, beta, label_smoothing)


def aot_unpaired_loss(policy: PairLogps, reference: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """The k-th smallest log-ratio of a chosen answer against the k-th smallest of a rejected one.

    Melnyk et al. 2024 (AOT, unpaired, arXiv 2406.05882, section 3), by sorting. As TRL's `aot_unpaired`. The
    distributions are those of one micro-batch of one rank.

    Args:
        policy: logps `[B]`; pairs that aren't `real` take no part in the order.
        reference: logps `[B]`.
        beta: inverse temperature.
        label_smoothing: eps, in [0, 0.5).

    Returns:
        `[B]` losses in nats, each at the pair whose chosen answer it holds.
    """
    return _sorted_loss(*_log_ratios(policy, reference), policy.real, beta, label_smoothing)


def _sorted_loss(above: Tensor, below: Tensor, real: Tensor | None, beta: float, label_smoothing: float) -> Tensor:
    real = torch.ones_like(above, dtype=torch.bool) if real is None else real
    # What isn't real goes to the end of both orders.
    order = above.masked_fill(~real, torch.inf).argsort(stable=True)
    lower = below[below.masked_fill(~real, torch.inf).argsort(stable=True)]
    delta = torch.where(real[order], above[order] - lower, 0.0)
    losses = -F.logsigmoid(beta * delta) * (1 - label_smoothing) - F.logsigmoid(-beta * delta) * label_smoothing
    return losses[order.argsort()]
