"""Means over seeds, paired differences and what a line reaches at a given KL. Pure functions of plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev

Point = tuple[float, float]


def mean_and_error(values: Sequence[float]) -> Point:
    """Mean over seeds and its standard error; NaN where there is one seed only."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return fmean(values), error


def t_tail(t: float, freedom: int) -> float:
    """P(|T| > t) of Student's distribution.

    Args:
        t: 0 or above.
        freedom: degrees of freedom.
    """
    # t = sqrt(freedom) tan(angle) turns the density into a power of the cosine: Simpson's rule on a bounded interval.
    angle, parts = math.atan(t / math.sqrt(freedom)), 400
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    weights = [1 if i in (0, parts) else 4 if i % 2 else 2 for i in range(parts + 1)]
    inner = sum(w * math.cos(angle * i / parts) ** (freedom - 1) for i, w in enumerate(weights)) * angle / parts / 3
    return max(0.0, 1.0 - 2.0 * scale * inner)


def t_quantile(freedom: int, tail: float = 0.05) -> float:
    """t with P(|T| > t) = tail."""
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, freedom) > tail else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Paired:
    """Differences of pairs of values, one a seed.

    Attributes:
        seeds: how many.
        mean: of the differences.
        half_width: of the 95 % interval of the mean, by Student's distribution; NaN for one seed.
        p: of the two-sided paired t-test; NaN for one seed.
    """

    seeds: int
    mean: float
    half_width: float
    p: float

    def row(self) -> dict[str, float | None]:
        """As plain values: None where there is no number."""
        return {key: None if math.isnan(value) else value for key, value in asdict(self).items()}


def paired(differences: Sequence[float]) -> Paired:
    """The paired t-test.

    Args:
        differences: one a seed, at least one.
    """
    mean, error = mean_and_error(differences)
    if math.isnan(error):
        return Paired(len(differences), mean, math.nan, math.nan)
    freedom = len(differences) - 1
    p = t_tail(abs(mean) / error, freedom) if error else float(mean == 0)
    return Paired(len(differences), mean, t_quantile(freedom) * error, p)


def at_kl(line: Sequence[Point], kl: float) -> float | None:
    """What a line of runs reaches at a KL, by straight lines between neighbours.

    Args:
        line: (KL, value) of at least one run.
        kl: to read it at.

    Returns:
        None outside the line: nothing is extrapolated.
    """
    points = sorted(line)
    if not points[0][0] <= kl <= points[-1][0]:
        return None
    for (left, below), (right, above) in zip(points, points[1:], strict=False):
        if left <= kl <= right:
            return below if right == left else below + (above - below) * (kl - left) / (right - left)
    return points[0][1]
