"""Rank 1: preference losses on [B] logps, unreduced: those of the margin between chosen and rejected.

Each takes the logps of policy and reference, `[B]` nats summed over tokens, and gives `[B]` losses. `score` maps the
log-ratios log(pi / pi_ref) to scores (`divergences.py`); None leaves them as they are, which is the reverse KL of DPO.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sdpo_lightning.types import PairLogps

Score = Callable[[Tensor], Tensor]


def scores(policy: PairLogps, reference: PairLogps, score: Score | None = None) -> tuple[Tensor, Tensor]:
    """Scores of chosen and rejected, each `[B]`: log(pi / pi_ref), or what `score` makes of it."""
    chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    return (chosen, rejected) if score is None else (score(chosen), score(rejected))


def score_margin(policy: PairLogps, reference: PairLogps, score: Score | None = None) -> Tensor:
    """Score of chosen minus score of rejected, `[B]`."""
    # Each side first: near the reference these differences are exact, those of gamma and gamma_ref aren't.
    chosen, rejected = scores(policy, reference, score)
    return chosen - rejected


def mean_score_margin(policy: PairLogps, reference: PairLogps, score: Score | None = None) -> Tensor:
    """The same, each score divided by the tokens of its completion, `[B]`."""
    chosen, rejected = scores(policy, reference, score)
    return chosen / policy.chosen_lengths.clamp(min=1) - rejected / policy.rejected_lengths.clamp(min=1)


def smoothed_sigmoid(logits: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - eps) log sigmoid(z) - eps log sigmoid(-z), `[B]`: cross-entropy with labels wrong at the rate eps."""
    if label_smoothing == 0.0:
        return -F.logsigmoid(logits)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def dpo_loss(
    policy: PairLogps,
    reference: PairLogps,
    beta: float,
    label_smoothing: float = 0.0,
    score: Score | None = None,
) -> Tensor:
    """The sigmoid loss of DPO, with the conservative label smoothing of cDPO.

    Rafailov et al. 2023 (arXiv 2305.18290, Eq. 7); sDPO (arXiv 2403.19270, Eq. 1) is the same loss with
    M_{t-1} as reference: -log sigmoid(beta * (gamma_policy - gamma_ref)). With label smoothing eps
    (Mitchell 2023, "A note on DPO with noisy preferences", Eq. 3) the loss is
    -(1 - eps) log sigmoid(z) - eps log sigmoid(-z). TRL 1.16 ignores label smoothing here; this follows the note.

    Args:
        policy: summed logps of the policy, `[B]` nats.
        reference: summed logps of the reference, `[B]` nats.
        beta: inverse temperature of the implied reward, above 0.
        label_smoothing: eps, probability that a label is wrong, in [0, 0.5).
        score: of the log-ratios; None is the reverse KL.

    Returns:
        `[B]` losses in nats; ln 2 where policy and reference agree.
    """
    return smoothed_sigmoid(beta * score_margin(policy, reference, score), label_smoothing)


def sigmoid_norm_loss(policy: PairLogps, reference: PairLogps, beta: float, score: Score | None = None) -> Tensor:
    """Length-normalised DPO: -log sigmoid(beta * (chosen score / |y_w| - rejected score / |y_l|)).

    Lambert et al. 2024 (Tulu 3, arXiv 2411.15124, section 5.1); `sigmoid_norm` of TRL.

    Args:
        policy: logps `[B]`, and lengths `[B]` tokens.
        reference: logps `[B]`.
        beta: larger than DPO's by about the number of tokens.
        score: of the log-ratios; None is the reverse KL.

    Returns:
        `[B]` losses in nats.
    """
    return -F.logsigmoid(beta * mean_score_margin(policy, reference, score))


def hinge_loss(policy: PairLogps, reference: PairLogps, beta: float, score: Score | None = None) -> Tensor:
    """max(0, 1 - beta * margin).

    The calibration loss of SLiC-HF (Zhao et al. 2023, arXiv 2305.10425, section 2) on log-ratios to the
    reference, as Liu et al. 2023 (RSO, arXiv 2309.06657) write it; SLiC's own has no reference. As TRL's `hinge`.

    Args:
        policy: logps `[B]`.
        reference: logps `[B]`.
        beta: 1 / the margin that is asked for.
        score: of the log-ratios; None is the reverse KL.

    Returns:
        `[B]` losses; 1 where policy and reference agree.
    """
    return torch.relu(1 - beta * score_margin(policy, reference, score))


def ipo_loss(policy: PairLogps, reference: PairLogps, beta: float, score: Score | None = None) -> Tensor:
    """(margin of the scores per token - 1 / (2 beta))^2.

    Azar et al. 2023 (arXiv 2310.12036, Eq. 17, beta is its tau) sums over tokens; TRL's `ipo`, which this follows,
    divides each side by its length. `summed_ipo_loss` is the paper's.

    Args:
        policy: logps `[B]`, and lengths `[B]` tokens.
        reference: logps `[B]`.
        beta: tau.
        score: of the log-ratios; None is the reverse KL.

    Returns:
        `[B]` losses; 1 / (4 beta^2) where policy and reference agree.
    """
    return (mean_score_margin(policy, reference, score) - 1 / (2 * beta)) ** 2


def summed_ipo_loss(policy: PairLogps, reference: PairLogps, beta: float, score: Score | None = None) -> Tensor:
    """(margin - 1 / (2 beta))^2, of summed logps: Azar et al. 2023 (arXiv 2310.12036, Eq. 17). TRL has only `ipo_loss`.

    Args:
        policy: logps `[B]`.
        reference: logps `[B]`.
        beta: tau.
        score: of the log-ratios; None is the reverse KL.

    Returns:
        `[B]` losses; 1 / (4 beta^2) where policy and reference agree.
    """
    return (score_margin(policy, reference, score) - 1 / (2 * beta)) ** 2


def robust_loss(
    policy: PairLogps, reference: PairLogps, beta: float, label_smoothing: float, score: Score | None = None
) -> Tensor:
    """Unbiased under labels that are flipped at the rate eps: ((1 - eps) L(z) - eps L(-z)) / (1 - 2 eps).

    Chowdhury et al. 2024 (rDPO, arXiv 2403.00409, section 3.1), with L(z) = -log sigmoid(z). As TRL's `robust`.

    Args:
        policy: logps `[B]`.
        reference: logps `[B]`.
        beta: inverse temperature.
        label_smoothing: eps, in [0, 0.5).
        score: of the log-ratios; None is the reverse KL.

    Returns:
        `[B]` losses, which may be negative; ln 2 where policy and reference agree.
    """
    logits = beta * score_margin(policy, reference, score)
    kept, flipped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def exo_pair_loss(
    policy: PairLogps, reference: PairLogps, beta: float, label_smoothing: float, score: Score | None = None
) -> Tensor:
    """KL of the policy's choice between the two answers from the labels': q log(q / p), summed over both.

    Ji et al. 2024 (EXO, arXiv 2402.00856, Eq. 16): q = sigmoid(z) for chosen, 1 - q for rejected; p = 1 - eps, eps.
    As TRL's `exo_pair`.

    Args:
        policy: logps `[B]`.
        reference: logps `[B]`.
        beta: inverse temperature.
        label_smoothing: eps, in (0, 0.5).
        score: of the log-ratios; None is the reverse KL.

    Returns:
        `[B]` losses in nats.
    """
    logits = beta * score_margin(policy, reference, score)
    chosen = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-label_smoothing))
    rejected = torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(label_smoothing))
    return chosen + rejected


def discopop_loss(
    policy: PairLogps, reference: PairLogps, beta: float, tau: float = 0.05, score: Score | None = None
) -> Tensor:
    """The log-ratio modulated loss: (1 - m) * -log sigmoid(z) + m * exp(-z), with m = sigmoid(z / tau).

    Lu et al. 2024 (DiscoPOP, arXiv 2406.08414, section 6.1, Eq. 5). As TRL's `discopop`, which gives NaN below z = -88.

    Args:
        policy: logps `[B]`.
        reference: logps `[B]`.
        beta: inverse temperature.
        tau: temperature of the blend, in (0, 1].
        score: of the log-ratios; None is the reverse KL.

    Returns:
        `[B]` losses; (ln 2 + 1) / 2 where policy and reference agree.
    """
    logits = beta * score_margin(policy, reference, score)
    # One exponent: exp(-z) alone overflows where m is 0.
    exponential = torch.exp(F.logsigmoid(logits / tau) - logits)
    return -F.logsigmoid(logits) * torch.sigmoid(-logits / tau) + exponential


def dpop_loss(policy: PairLogps, reference: PairLogps, beta: float, penalty: float = 50.0) -> Tensor:
    """DPO that doesn't let the chosen answer fall: -log sigmoid(beta * (margin - lambda * max(0, -chosen score))).

    Pal et al. 2024 (DPO-Positive, Smaug, arXiv 2402.13228, section 4, Eq. 3). TRL has none.

    Args:
        policy: logps `[B]`.
        reference: logps `[B]`.
        beta: inverse temperature.
        penalty: lambda, per nat that the chosen answer lies below the reference.

    Returns:
        `[B]` losses in nats; ln 2 where policy and reference agree.
    """
    chosen, rejected = scores(policy, reference)
    return -F.logsigmoid(beta * (chosen - rejected - penalty * torch.relu(-chosen)))


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
