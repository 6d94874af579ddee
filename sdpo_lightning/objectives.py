"""Rank 3: what `model.loss` takes by class_path: the losses of one pair, with their settings.

Beta isn't among the settings: it is `model.beta` for all, so that rewards in the log have one scale.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from sdpo_lightning.divergences import Divergence
from sdpo_lightning.losses import (
    discopop_loss,
    dpo_loss,
    dpop_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_loss,
    robust_loss,
    sigmoid_norm_loss,
    summed_ipo_loss,
)
from sdpo_lightning.losses_unpaired import (
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    nca_pair_loss,
    sppo_hard_loss,
)
from sdpo_lightning.types import ConfigurationError, PairLogps


class PreferenceLoss(ABC):
    """A loss of B pairs. A subclass is a dataclass whose fields are its settings.

    Attributes:
        uses_reference: False for a loss of the policy alone; the reference is then kept for the log.
        across_pairs: True if a loss isn't that of one pair; then there are no weights of pairs.
        whole_logps: True if the logps must be the whole answer's, without `ld_alpha`.
    """

    uses_reference: ClassVar[bool] = True
    across_pairs: ClassVar[bool] = False
    whole_logps: ClassVar[bool] = False

    @abstractmethod
    def per_pair(self, policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
        """Losses `[B]`, unreduced, before any weights of pairs.

        Args:
            policy: logps `[B]` with their graph.
            reference: logps `[B]`.
            beta: `model.beta`.
        """

    def __call__(self, policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
        """Losses `[B]`, times the weights of the pairs where the logps have some; see `per_pair`."""
        losses = self.per_pair(policy, reference, beta)
        return losses if policy.pair_weights is None else losses * policy.pair_weights

    def settings(self) -> dict[str, Any]:
        """Plain values that a resumed run must agree on."""
        given = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]
        return {"class": _name(self), **given}

    def of_stage(self, index: int, name: str) -> PreferenceLoss:
        """The loss of one stage; most are the same in all.

        Args:
            index: of the stage, from 1.
            name: of the stage.
        """
        return self

    def check_stages(self, names: Sequence[str], mergeable: Sequence[str]) -> None:  # noqa: B027
        """Refuse what doesn't go with the run's stages.

        Args:
            names: of the stages, in whatever order.
            mergeable: sources whose stages may be joined under names like `a+b`.
        """

    def start_stage(self) -> None:  # noqa: B027
        """Forget what was gathered in the stage before."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values that were gathered, for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Go on with what a checkpoint holds."""


def _name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _plain(value: Any) -> Any:
    if isinstance(value, PreferenceLoss):
        return value.settings()
    if isinstance(value, Divergence):
        return _name(value) if not vars(value) else {"class": _name(value), **vars(value)}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def check_smoothing(loss: PreferenceLoss, label_smoothing: float, above_zero: bool = False) -> None:
    """Refuse a rate of wrong labels outside its range.

    Raises:
        ConfigurationError: naming the loss.
    """
    if not 0 <= label_smoothing < 0.5 or above_zero and label_smoothing == 0:
        expected = "(0, 0.5)" if above_zero else "[0, 0.5)"
        raise ConfigurationError(
            f"`label_smoothing` of {type(loss).__name__} is {label_smoothing}, expected within {expected}"
        )


@dataclass(frozen=True)
class SigmoidLoss(PreferenceLoss):
    """`losses.dpo_loss`: DPO and cDPO; the default."""

    label_smoothing: float = 0.0
    divergence: Divergence | None = None

    def __post_init__(self) -> None:
        check_smoothing(self, self.label_smoothing)

    def per_pair(self, policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
        """`[B]`; see `losses.dpo_loss`."""
        return dpo_loss(policy, reference, beta, self.label_smoothing, self.divergence)


@dataclass(frozen=True)
class SigmoidNormLoss(PreferenceLoss):
    """`losses.sigmoid_norm_loss`: length-normalised DPO."""

    divergence: Divergence | None = None

    def per_pair(self, policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
        """`[B]`; see `losses.sigmoid_norm_loss`."""
        return sigmoid_norm_loss(policy, reference, beta, self.divergence)


@dataclass(frozen=True)
class HingeLoss(PreferenceLoss):
    """`losses.hinge_loss`: SLiC and RSO."""

    divergence: Divergence | None = None

    def per_pair(self, policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
        """`[B]`; see `losses.hinge_loss`."""
        return hinge_loss(policy, reference, beta, self.divergence)


@dataclass(frozen=True)
class IPOLoss(PreferenceLoss):
    """`losses.ipo_loss`: IPO of scores per token, as TRL."""

    divergence: Divergence | None = None

    def per_pair(self, policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
        """`[B]`; see `losses.ipo_loss`."""
        return ipo_loss(policy, reference, beta, self.divergence)


@dataclass(frozen=True)
class SummedIPOLoss(PreferenceLoss):
    """`losses.summed_ipo_loss`: IPO as in the paper."""

    divergence: Divergence | None = None

    def per_pair(self, policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
        """`[B]`; see `losses.summed_ipo_loss`."""
        return summed_ipo_loss(policy, reference, beta, self.divergence)


@dataclass(frozen=True)
class RobustLoss(PreferenceLoss):
    """`losses.robust_loss`: rDPO."""

    label_smoothing: float = 0.1
    divergence: Divergence | None = None

    def __post_init__(self) -> None:
        check_smoothing(self, self.label_smoothing)

    def per_pair(self, policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
        """`[B]`; see `losses.robust_loss`."""
        return robust_loss(policy, reference, beta, self.label_smoothing, self.divergence)


@dataclass(frozen=True)
class EXOPairLoss(PreferenceLoss):
    """`losses.exo_pair_loss`: EXO."""

    label_smoothing: float = 1e-3
    divergence: Divergence | None = None

    def __post_init__(self) -> None:
        check_smoothing(self, self.label_smoothing, above_zero=True)

    def per_pair(self, policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
        """`[B]`; see `losses.exo_pair_loss`."""
        return exo_pair_loss(policy, reference, beta, self.label_smoothing, self.divergence)


@dataclass(frozen=True)
class DiscoPOPLoss(PreferenceLoss):
    """`losses.discopop_loss`: DiscoPOP."""

    tau: float = 0.05
    divergence: Divergence | None = None

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise ConfigurationError(f"`tau` of DiscoPOPLoss is {self.tau}, expected within (0, 1]")

    def per_pair(self, policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
        """`[B]`; see `losses.discopop_loss`."""
        return discopop_loss(policy, reference, beta, self.tau, self.divergence)


@dataclass(frozen=True)
class DPOPLoss(PreferenceLoss):
    """`losses.dpop_loss`: DPO-Positive."""

    penalty: float = 50.0

    def __post_init__(self) -> None:
        if self.penalty < 0:
            raise ConfigurationError(f"`penalty` of DPOPLoss is {self.penalty}, expected 0 or more")

    def per_pair(self, policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
        """`[B]`; see `losses.dpop_loss`."""
        return dpop_loss(policy, reference, beta, self.penalty)


@dataclass(frozen=True)
class NCAPairLoss(PreferenceLoss):
    """`losses_unpaired.nca_pair_loss`: NCA."""

    def per_pair(self, policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
        """`[B]`; see `losses_unpaired.nca_pair_loss`."""
        return nca_pair_loss(policy, reference, beta)


@dataclass(frozen=True)
class BCOPairLoss(PreferenceLoss):
    """`losses_unpaired.bco_pair_loss` without a shift, as TRL."""

    def per_pair(self, policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
        """`[B]`; see `losses_unpaired.bco_pair_loss`."""
        return bco_pair_loss(policy, reference, beta)


@dataclass(frozen=True)
class SPPOHardLoss(PreferenceLoss):
    """`losses_unpaired.sppo_hard_loss`: SPPO with hard labels."""

    def per_pair(self, policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
        """`[B]`; see `losses_unpaired.sppo_hard_loss`."""
        return sppo_hard_loss(policy, reference, beta)


@dataclass(frozen=True)
class APOZeroLoss(PreferenceLoss):
    """`losses_unpaired.apo_zero_loss`: APO-zero."""

    def per_pair(self, policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
        """`[B]`; see `losses_unpaired.apo_zero_loss`."""
        return apo_zero_loss(policy, reference, beta)


@dataclass(frozen=True)
class APODownLoss(PreferenceLoss):
    """`losses_unpaired.apo_down_loss`: APO-down."""

    def per_pair(self, policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
        """`[B]`; see `losses_unpaired.apo_down_loss`."""
        return apo_down_loss(policy, reference, beta)
