"""Rank 1: a pool that grows from the easiest pairs to all within a stage. Pure functions.

Each pair is drawn exactly once: the draws are without replacement, there are as many as pairs, and at every draw the
pool holds a pair that hasn't been drawn.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch

from sdpo_lightning.types import ConfigurationError


class Pacing(ABC):
    """How the pool of a stage's first pass grows. A subclass is a dataclass whose fields are its settings."""

    @abstractmethod
    def competence(self, progress: float) -> float:
        """The share of the stage's pairs, the easiest ones, from which a pair is drawn.

        Args:
            progress: share of the pass that is drawn with this pair, in (0, 1].
        """

    def settings(self) -> dict[str, Any]:
        """Plain values that a resumed run must agree on."""
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class RootCompetence(Pacing):
    """c(t) = min(1, sqrt(t (1 - c0^2) / T + c0^2)) (Platanios et al. 2019, arXiv 1903.09848), t and T in passes.

    Theirs draws with replacement over many passes; ours draws each pair once a pass, so T can't be beyond the first.

    Attributes:
        start: c0, the easiest share of the pairs that the pass begins with.
        until: T, the share of the first pass after which the pool holds all pairs.
    """

    start: float = 0.01
    until: float = 1.0

    def __post_init__(self) -> None:
        for name in ("start", "until"):
            if not 0 < (value := getattr(self, name)) <= 1:
                raise ConfigurationError(f"`{name}` of RootCompetence is {value}, expected within (0, 1]")

    def competence(self, progress: float) -> float:
        """The root of a line: the pool grows fast at first, and more slowly the more it holds."""
        return min(1.0, math.sqrt(progress * (1 - self.start**2) / self.until + self.start**2))


def pool_sizes(total: int, pacing: Pacing) -> list[int]:
    """How many of the easiest pairs each draw of a pass is made from.

    Args:
        total: P, pairs of the pass.
        pacing: gives the share.

    Returns:
        P numbers that never fall. Number k, from 0, is the competence at (k + 1) / P of P pairs, rounded up, but at
        least k + 1: so many must have been in the pool by then.
    """
    sizes, largest = [], 0
    for drawn in range(1, total + 1):
        share = pacing.competence(drawn / total)
        largest = min(total, max(largest, drawn, math.ceil(share * total)))
        sizes.append(largest)
    return sizes


def paced_places(total: int, pacing: Pacing, generator: torch.Generator) -> list[int]:
    """The order of a pass: draw k is uniform over those of the `pool_sizes[k]` easiest pairs that are left.

    Args:
        total: P, pairs of the pass, the easiest first.
        pacing: how the pool grows.
        generator: of the draws.

    Returns:
        A permutation of 0..P-1.
    """
    uniform = torch.rand(total, generator=generator, dtype=torch.float64).tolist()
    pool: list[int] = []
    order = []
    for draw, (before, size) in enumerate(pairwise([0, *pool_sizes(total, pacing)])):
        pool.extend(range(before, size))
        place = min(int(uniform[draw] * len(pool)), len(pool) - 1)
        pool[place], pool[-1] = pool[-1], pool[place]
        order.append(pool.pop())
    return order


def check_pacing(pacing: Pacing | None, bucket_window: int, shuffle: bool) -> None:
    """Refuse settings of `data` that would order the pairs another way.

    Raises:
        ConfigurationError: naming both.
    """
    if pacing is not None and bucket_window:
        raise ConfigurationError(
            f"`data.bucket_window` is {bucket_window} with `data.pacing`: the one sorts by length what the other has "
            "ordered by difficulty; leave one out, `data.batch_tokens` goes with both"
        )
    if pacing is not None and not shuffle:
        raise ConfigurationError(
            "`data.shuffle` is false with `data.pacing`, which draws from a pool at random; leave one out"
        )


def read_pacing(value: Mapping[str, Any] | None) -> Pacing | None:
    """`data.pacing` of plain values; another project's class, whose code isn't run, counts as none.

    Args:
        value: `class_path` and `init_args`.

    Raises:
        ConfigurationError: settings outside their range.
    """
    own = f"{RootCompetence.__module__}.{RootCompetence.__qualname__}"
    if value is None or value["class_path"] != own:
        return None
    return RootCompetence(**value.get("init_args") or {})
