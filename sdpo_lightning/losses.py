"""Rank 1: preference losses on [B] logps, unreduced."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sdpo_lightning.types import PairLogps


def dpo_loss(policy: PairLogps, reference: PairLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """The sigmoid loss of DPO, with the conservative label smoothing of cDPO.

    Rafailov et al. 2023 (arXiv 2305.18290, Eq. 7); sDPO (arXiv 2403.19270, Eq. 1) is the same loss with
    M_{t-1} as reference: -log sigmoid(beta * (gamma_policy - gamma_ref)). With label smoothing eps
    (Mitchell 2023, "A note on DPO with noisy preferences", Eq. 3) the loss is
    -(1 - eps) log sigmoid(z) - eps log sigmoid(-z).

    Args:
        policy: summed logps of the policy, `[B]` nats.
        reference: summed logps of the reference, `[B]` nats.
        beta: inverse temperature of the implied reward, above 0.
        label_smoothing: eps, probability that a label is wrong, in [0, 0.5).

    Returns:
        `[B]` losses in nats; ln 2 where policy and reference agree.
    """
    logits = beta * (policy.gamma - reference.gamma)
    if label_smoothing == 0.0:
        return -F.logsigmoid(logits)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def implicit_rewards(policy: PairLogps, reference: PairLogps, beta: float) -> tuple[Tensor, Tensor]:
    """beta * (policy logps - reference logps), detached (arXiv 2305.18290, Eq. 5 without the constant).

    Args:
        policy: summed logps of the policy, `[B]` nats.
        reference: summed logps of the reference, `[B]` nats.
        beta: inverse temperature.

    Returns:
        Chosen rewards `[B]` and rejected rewards `[B]`.
    """
    chosen = beta * (policy.chosen - reference.chosen)
    rejected = beta * (policy.rejected - reference.rejected)
    return chosen.detach(), rejected.detach()
