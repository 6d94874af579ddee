"""Rank 1: how hard a pair is for M_0, and how much of that is the length of its answers. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from sdpo_lightning.types import ConfigurationError, PairLogps

# `[P]` scores of all ranked pairs of all sources at once: higher is easier, above 0 counts as right, NaN doesn't count.
PairScores = Callable[[PairLogps], Tensor]

# Answers whose lengths differ by at most this share of the longer one are of like length.
MATCHED_PERCENT = 10


def sum_logps(logps: PairLogps) -> Tensor:
    """Gamma `[P]` of summed logps (arXiv 2403.19270, below Eq. 1), nats."""
    return logps.gamma


def mean_logps(logps: PairLogps) -> Tensor:
    """Gamma `[P]` of the means over an answer's tokens, nats a token."""
    return logps.chosen / logps.chosen_lengths - logps.rejected / logps.rejected_lengths


def length_matched(logps: PairLogps) -> Tensor:
    """Gamma `[P]` of the pairs whose answers are of like length; NaN for the others, which then don't count."""
    return torch.where(is_matched(logps), logps.gamma, torch.nan)


def residual(logps: PairLogps) -> Tensor:
    """Gamma `[P]` less what the difference of the lengths explains: the residual of least squares with a constant.

    One line is fitted over all ranked pairs of all sources. Where all differences are equal it is level.
    """
    gamma, difference = logps.gamma.double(), length_difference(logps).double()
    away = difference - difference.mean()
    spread = (away**2).sum()
    slope = (away * gamma).sum() / spread if spread > 0 else torch.zeros_like(spread)
    return (gamma - gamma.mean() - slope * away).float()


_NAMED: Mapping[str, PairScores] = {
    "sum_logps": sum_logps,
    "mean_logps": mean_logps,
    "length_matched": length_matched,
    "residual": residual,
}


_EXPECTED = f"expected one of {list(_NAMED)} or the path of a function like 'package.module.function'"


def check_difficulty(setting: str) -> None:
    """Check `data.difficulty` without importing anybody's code.

    Raises:
        ConfigurationError: neither one of ours nor a dotted path.
    """
    parts = setting.split(".")
    if setting not in _NAMED and (len(parts) < 2 or not all(part.isidentifier() for part in parts)):
        raise ConfigurationError(f"`data.difficulty` is {setting!r}; {_EXPECTED}")


def find_difficulty(setting: str) -> PairScores:
    """The function that `data.difficulty` names: one of ours, or the dotted path of another.

    Raises:
        ConfigurationError: there is none.
    """
    if setting in _NAMED:
        return _NAMED[setting]
    module, _, name = setting.rpartition(".")
    try:
        found = getattr(import_module(module), name) if module else None
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"`data.difficulty` is {setting!r}: {error}; {_EXPECTED}") from error
    if not callable(found):
        raise ConfigurationError(f"`data.difficulty` is {setting!r}, which is no function; {_EXPECTED}")
    return found


def difficulty_rewards(policy: PairLogps, reference: PairLogps) -> PairLogps:
    """M_0's rewards without beta, in place of its logps: ordinary rewards, where a reference is given.

    Args:
        policy: logps of M_0, `[P]`.
        reference: logps of `data.difficulty_reference` for the same pairs, `[P]`.

    Returns:
        `[P]`; its gamma is that of M_0 less that of the reference.
    """
    chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    return PairLogps(chosen, rejected, policy.chosen_lengths, policy.rejected_lengths)


def length_difference(logps: PairLogps) -> Tensor:
    """Tokens `[P]` that the chosen answer has more than the rejected one."""
    return logps.chosen_lengths - logps.rejected_lengths


def is_matched(logps: PairLogps) -> Tensor:
    """`[P]` bool: the lengths of the answers differ by at most 10 % of the longer one."""
    longer = torch.maximum(logps.chosen_lengths, logps.rejected_lengths)
    return 100 * length_difference(logps).abs() <= MATCHED_PERCENT * longer


def accuracy_of(scores: Tensor) -> float | None:
    """Share of the scores `[P]` above 0, ties 1/2; NaN doesn't count, and None where nothing is left."""
    scores = scores[~scores.isnan()]
    if not len(scores):
        return None
    return ((scores > 0).double() + 0.5 * (scores == 0).double()).mean().item()


def rank_correlation(left: Tensor, right: Tensor) -> float | None:
    """Spearman's correlation of two `[P]`, ties at their mean rank; None where one of them is constant."""
    ranks = torch.stack([_mean_ranks(left), _mean_ranks(right)])
    ranks -= ranks.mean(1, keepdim=True)
    spread = ranks.square().sum(1).prod().sqrt()
    return None if spread == 0 else (ranks.prod(0).sum() / spread).item()


def _mean_ranks(values: Tensor) -> Tensor:
    _, places, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts - 1) / 2)[places]


@dataclass(frozen=True)
class LengthFigures:
    """How much of a source's ranking may be the length of its answers.

    Attributes:
        shorter_chosen: share of pairs whose chosen answer is the shorter one, ties 1/2.
        length_matched_pairs: pairs whose lengths differ by at most 10 %.
        length_matched_accuracy: share of those with gamma > 0, ties 1/2; None without any.
        length_correlation: Spearman's, of gamma with the chosen answer's length less the rejected one's.
    """

    shorter_chosen: float
    length_matched_pairs: int
    length_matched_accuracy: float | None
    length_correlation: float | None


def length_figures(logps: PairLogps) -> LengthFigures:
    """Figures of one source.

    Args:
        logps: of its ranked pairs, `[P]`, P at least 1.
    """
    difference = length_difference(logps)
    shorter = accuracy_of(-difference.double())
    assert shorter is not None, "no pairs"
    matched = length_matched(logps)
    return LengthFigures(
        shorter,
        int((~matched.isnan()).sum()),
        accuracy_of(matched),
        rank_correlation(logps.gamma, difference),
    )


def length_sentence(order: Sequence[str], shorter_chosen: Mapping[str, float | None]) -> str:
    """What to say where the order is that of length alone; empty where it isn't, or isn't known.

    Args:
        order: names of the sources, easy to hard.
        shorter_chosen: name -> share of pairs whose chosen answer is the shorter one.
    """
    shares = [shorter_chosen.get(name) for name in order]
    known = [share for share in shares if share is not None]
    if len(known) < max(2, len(order)) or any(a < b for a, b in zip(known, known[1:], strict=False)):
        return ""
    return (
        "the order is that of the share of pairs whose chosen answer is the shorter one: length alone would give it; "
        "`data.difficulty` residual or length_matched take length out"
    )
