"""Rank 1: torchmetrics of rewards, margins, accuracies and gamma, kept as sums and counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from sdpo_lightning.types import PairLogps, PreferenceBatch

_REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


class PreferenceMetrics(Metric):
    """Weighted means over the pairs seen since the last reset, exact over micro-batches and ranks.

    Keys of `compute`: `loss`, `rewards/{chosen,rejected,margins,accuracies}` against the reference,
    `rewards_m0/...` against M_0 (pairs whose M_0 logps are known), `logps/{chosen,rejected}` (nats, summed
    over tokens), `gamma` and `gamma_ref`, `accuracies_gamma` (share with gamma > 0, ties 1/2),
    `logps_per_token/{chosen,rejected}` (change per token since the stage began, nats) and `pairs`.
    Reward accuracies are strict: a tie counts 0, as in TRL.
    """

    full_state_update = False
    # States, each over the pairs since the last reset: `[len(KEYS)]`, a scalar, `[len(M0_KEYS)]`, a scalar.
    sums: Tensor
    count: Tensor
    sums_m0: Tensor
    count_m0: Tensor
    KEYS = (
        "loss",
        *_REWARDS,
        "logps/chosen",
        "logps/rejected",
        "logps_per_token/chosen",
        "logps_per_token/rejected",
        "gamma",
        "gamma_ref",
        "accuracies_gamma",
    )
    M0_KEYS = tuple(key.replace("rewards", "rewards_m0", 1) for key in _REWARDS)

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(len(self.KEYS), dtype=torch.float64)
        zeros_m0 = torch.zeros(len(self.M0_KEYS), dtype=torch.float64)
        self.add_state("sums", default=zeros, dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sums_m0", default=zeros_m0, dist_reduce_fx="sum")
        self.add_state("count_m0", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(
        self,
        losses: Tensor,
        policy: PairLogps,
        reference: PairLogps,
        weights: Tensor,
        beta: float,
        m0: PairLogps | None = None,
        m0_known: Tensor | None = None,
    ) -> None:
        """Add the pairs of one micro-batch.

        Args:
            losses: `[B]`, unreduced.
            policy: logps of the policy, `[B]`.
            reference: logps of the reference, `[B]`.
            weights: `[B]`, 0 for filler pairs.
            beta: scale of the rewards.
            m0: logps of M_0, `[B]`, or None where M_0 wasn't scored.
            m0_known: `[B]` bool, pairs whose M_0 logps are known.
        """
        change_chosen = (policy.chosen - reference.chosen) / reference.chosen_lengths
        change_rejected = (policy.rejected - reference.rejected) / reference.rejected_lengths
        gamma = policy.gamma
        rows = [
            losses,
            *_reward_rows(policy, reference, beta),
            policy.chosen,
            policy.rejected,
            change_chosen,
            change_rejected,
            gamma,
            reference.gamma,
            (gamma > 0).float() + 0.5 * (gamma == 0).float(),
        ]
        self.sums += _weighted_sums(rows, weights)
        self.count += weights.sum()
        if m0 is not None and m0_known is not None:
            known = weights * m0_known
            self.sums_m0 += _weighted_sums(_reward_rows(policy, m0, beta), known)
            self.count_m0 += known.sum()

    def compute(self) -> dict[str, Tensor]:
        """Means over the pairs; keys without any pair are left out."""
        values = dict(zip(self.KEYS, self.sums / self.count, strict=True)) if self.count > 0 else {}
        if self.count_m0 > 0:
            values |= dict(zip(self.M0_KEYS, self.sums_m0 / self.count_m0, strict=True))
        return values | {"pairs": self.count.clone()}


def _reward_rows(policy: PairLogps, reference: PairLogps, beta: float) -> list[Tensor]:
    chosen = beta * (policy.chosen - reference.chosen)
    rejected = beta * (policy.rejected - reference.rejected)
    return [chosen, rejected, chosen - rejected, (chosen > rejected).float()]


def _weighted_sums(rows: list[Tensor], weights: Tensor) -> Tensor:
    # Select, don't multiply: a filler pair may hold a non-finite value.
    table = torch.stack([row.double() for row in rows])
    return torch.where(weights > 0, table * weights, 0.0).sum(1)


def prediction_rows(
    policy: PairLogps, reference: PairLogps, batch: PreferenceBatch, source_of: Callable[[int], str]
) -> list[dict[str, Any]]:
    """Rows of `predictions.csv`, one a real pair.

    Args:
        policy: logps `[B]`.
        reference: logps `[B]`.
        batch: of the pairs.
        source_of: name of the source of a pair id.
    """
    rows = zip(
        batch.pair_id.tolist(),
        batch.weights.tolist(),
        *(t.tolist() for side in (policy, reference) for t in (side.chosen, side.rejected)),
        strict=True,
    )
    keys = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    return [
        {"pair_id": i, "source": source_of(i), **dict(zip(keys, values, strict=True))}
        for i, weight, *values in rows
        if weight > 0
    ]
