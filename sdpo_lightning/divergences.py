"""Rank 1: f-divergences between policy and reference: f' of the ratio instead of its logarithm; an estimate of KL."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sdpo_lightning.types import ConfigurationError, PairLogps

# Beyond it exp overflows fp32.
_LARGEST_EXPONENT = 80.0


class Divergence(ABC):
    """Scores f'(u) of ratios u = pi / pi_ref: Wang et al. 2023 (f-DPO, arXiv 2309.16240).

    DPO is f'(u) = log u + 1, the reverse KL; constants cancel between chosen and rejected.
    """

    @abstractmethod
    def __call__(self, log_ratios: Tensor) -> Tensor:
        """Scores `[B]` of log u `[B]`."""


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """f'(u) = log u. `reverse_kl` of TRL, and what no divergence means."""

    def __call__(self, log_ratios: Tensor) -> Tensor:
        """Scores `[B]` of log u `[B]`."""
        return log_ratios


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """f'(u) = 1 - 1 / u. `forward_kl` of TRL; not finite, as there, where an answer has lost more than 88 nats."""

    def __call__(self, log_ratios: Tensor) -> Tensor:
        """Scores `[B]` of log u `[B]`."""
        return 1 - torch.exp(-log_ratios)


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """f'(u) = log(2 u / (1 + u)). `js_divergence` of TRL."""

    def __call__(self, log_ratios: Tensor) -> Tensor:
        """Scores `[B]` of log u `[B]`."""
        return math.log(2) + F.logsigmoid(log_ratios)


@dataclass(frozen=True)
class AlphaDivergence(Divergence):
    """f'(u) = (u^(alpha - 1) - 1) / (alpha - 1). `alpha_divergence` of TRL.

    The paper's is (1 - u^(-alpha)) / alpha: TRL's alpha, which this follows, is 1 minus the paper's. Exponents above
    80 count as 80, as there.

    Attributes:
        alpha: 1 gives the reverse KL, 0 the forward one.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not math.isfinite(self.alpha):
            raise ConfigurationError(f"`alpha` of AlphaDivergence is {self.alpha}, expected a finite number")

    def __call__(self, log_ratios: Tensor) -> Tensor:
        """Scores `[B]` of log u `[B]`."""
        power = self.alpha - 1.0
        if abs(power) < 1e-6:
            return log_ratios
        return (torch.exp((power * log_ratios).clamp(max=_LARGEST_EXPONENT)) - 1.0) / power


def k2(policy: PairLogps, reference: PairLogps) -> Tensor:
    """(log pi(y | x) - log pi_ref(y | x))^2 / 2 of both answers of each pair.

    Schulman's k2 (http://joschu.net/blog/kl-approx.html): over answers of the policy its mean estimates a small
    KL(policy || reference). Over other answers, as the data's, it is a distance on those.

    Args:
        policy: logps `[B]`.
        reference: logps `[B]`.

    Returns:
        `[2, B]` float64, nats: of the chosen and the rejected answers.
    """
    return torch.stack([policy.chosen - reference.chosen, policy.rejected - reference.rejected]).double() ** 2 / 2


def k2_sums(weights: Tensor, policy: PairLogps, reference: PairLogps) -> Tensor:
    """Sum over completions of (log pi - log pi_ref)^2 / 2, and how many there are.

    Args:
        weights: `[B]`; pairs of weight 0 don't count.
        policy: logps `[B]`.
        reference: logps `[B]`.

    Returns:
        `[2]` float64.
    """
    real = weights > 0
    halves = torch.where(real, k2(policy, reference), 0.0)
    return torch.stack([halves.sum(), 2.0 * real.sum().double()])
