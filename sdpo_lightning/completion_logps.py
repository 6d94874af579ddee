"""Rank 2: what `model.logps` takes by class_path: from a model and a batch to the logps of its pairs.

Policy, reference and ranking use the same one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from sdpo_lightning.logprobs import alignment_weights, pair_logps
from sdpo_lightning.types import ConfigurationError, PairLogps, PreferenceBatch


class CompletionLogps(ABC):
    """Logps of both completions of each pair. A subclass is a dataclass whose fields are its settings."""

    @abstractmethod
    def __call__(self, model: nn.Module, batch: PreferenceBatch) -> PairLogps:
        """Logps `[B]` of a batch.

        Args:
            model: a `CausalBackbone`.
            batch: of B pairs.
        """

    def settings(self) -> dict[str, Any]:
        """Plain values: a resumed run and cached logps must agree on them."""
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class SummedLogps(CompletionLogps):
    """The sum over the tokens of each completion, or with `ld_alpha` below 1 the one of LD-DPO.

    Liu et al. 2024 (arXiv 2409.06411): tokens beyond the length of the pair's shorter completion count
    `ld_alpha` times. As TRL's `ld_alpha`. Lengths stay those of the whole completions.

    Attributes:
        ld_alpha: alpha, in [0, 1]; 1 is the plain sum.
    """

    ld_alpha: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.ld_alpha <= 1:
            raise ConfigurationError(f"`ld_alpha` of `model.logps` is {self.ld_alpha}, expected within [0, 1]")

    def __call__(self, model: nn.Module, batch: PreferenceBatch) -> PairLogps:
        """`[B]`; see `pair_logps`."""
        return pair_logps(model(batch), batch, self.ld_alpha)


@dataclass(frozen=True)
class WPOLogps(SummedLogps):
    """The same, with WPO's weights of the pairs, which the losses are multiplied by.

    Zhou et al. 2024 (arXiv 2406.11827, Eqs. 1 and 2, the sampled alignment of section 3.3): see `alignment_weights`.
    As TRL's `use_weighting`. The head gives the chance of a repeated draw in the same pass.
    """

    def __call__(self, model: nn.Module, batch: PreferenceBatch) -> PairLogps:
        """`[B]`; see `pair_logps` and `alignment_weights`."""
        logps, collisions = model(batch, collisions=True)
        pairs = pair_logps(logps, batch, self.ld_alpha)
        pairs.pair_weights = alignment_weights(logps, collisions, batch)
        return pairs
