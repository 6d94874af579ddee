"""Rank 4: what `model.loss` also takes: losses over several pairs, with a memory or without a reference; sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sdpo_lightning.completion_logps import CompletionLogps, SummedLogps, WPOLogps
from sdpo_lightning.data.staging import Staging
from sdpo_lightning.losses import implicit_rewards
from sdpo_lightning.losses_free import orpo_loss, sft_loss, simpo_loss
from sdpo_lightning.losses_unpaired import aot_loss, aot_unpaired_loss, bco_pair_loss
from sdpo_lightning.objectives import PreferenceLoss, check_smoothing
from sdpo_lightning.types import ConfigurationError, PairLogps


@dataclass(frozen=True)
class AOTLoss(PreferenceLoss):
    """`losses_unpaired.aot_loss`: AOT over the pairs of one micro-batch of one rank."""

    across_pairs = True
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_smoothing(self, self.label_smoothing)

    def per_pair(self, policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
        """`[B]`; see `losses_unpaired.aot_loss`."""
        return aot_loss(policy, reference, beta, self.label_smoothing)


@dataclass(frozen=True)
class AOTUnpairedLoss(PreferenceLoss):
    """`losses_unpaired.aot_unpaired_loss`: AOT over the answers of one micro-batch of one rank."""

    across_pairs = True
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_smoothing(self, self.label_smoothing)

    def per_pair(self, policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
        """`[B]`; see `losses_unpaired.aot_unpaired_loss`."""
        return aot_unpaired_loss(policy, reference, beta, self.label_smoothing)


@dataclass(frozen=True)
class SFTLoss(PreferenceLoss):
    """`losses_free.sft_loss`: the likelihood term of RPO, for a `WeightedSum`."""

    uses_reference = False
    whole_logps = True

    def per_pair(self, policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
        """`[B]`; see `losses_free.sft_loss`."""
        return sft_loss(policy)


@dataclass(frozen=True)
class SimPOLoss(PreferenceLoss):
    """`losses_free.simpo_loss`: SimPO."""

    uses_reference = False
    whole_logps = True
    margin: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_smoothing(self, self.label_smoothing)

    def per_pair(self, policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
        """`[B]`; see `losses_free.simpo_loss`."""
        return simpo_loss(policy, beta, self.margin, self.label_smoothing)


@dataclass(frozen=True)
class ORPOLoss(PreferenceLoss):
    """`losses_free.orpo_loss`: ORPO; `model.beta` is its lambda."""

    uses_reference = False
    whole_logps = True

    def per_pair(self, policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
        """`[B]`; see `losses_free.orpo_loss`."""
        return orpo_loss(policy, beta)


@dataclass
class BCOShiftedLoss(PreferenceLoss):
    """`losses_unpaired.bco_pair_loss` with the paper's shift: the mean reward of the stage so far.

    Over all ranks and both answers of every real pair that was trained on, this micro-batch included. The rewards begin
    at 0 with each stage's new reference, and so does the mean. A checkpoint holds it; held-out pairs only use it.
    """

    def __post_init__(self) -> None:
        self._sum = torch.zeros(2, dtype=torch.float64)

    def per_pair(self, policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
        """`[B]`; see `losses_unpaired.bco_pair_loss`."""
        if policy.chosen.requires_grad:
            self._gather(policy, reference, beta)
        total, count = self._sum.to(policy.chosen.device)
        shift = total / count.clamp(min=1)
        return bco_pair_loss(policy, reference, beta, shift.to(policy.chosen.dtype))

    def _gather(self, policy: PairLogps, reference: PairLogps, beta: float) -> None:
        chosen, rejected = implicit_rewards(policy, reference, beta)
        real = torch.ones_like(chosen, dtype=torch.bool) if policy.real is None else policy.real
        rewards = torch.where(real, chosen.double() + rejected.double(), 0.0)
        new = torch.stack([rewards.sum(), 2 * real.sum().double()])
        if dist.is_initialized():
            # Each rank has the same number of micro-batches.
            dist.all_reduce(new)
        self._sum = self._sum.to(new.device) + new

    def start_stage(self) -> None:
        """Forget the rewards against the reference before."""
        self._sum = torch.zeros_like(self._sum)

    def state_dict(self) -> dict[str, Any]:
        """Sum and number of the rewards."""
        return {"sum_and_count": self._sum.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the mean of a checkpoint."""
        self._sum = torch.tensor(state["sum_and_count"], dtype=torch.float64)


@dataclass(frozen=True)
class WeightedSum(PreferenceLoss):
    """Several losses of the same logps, each times its weight: RPO is a SigmoidLoss and an SFTLoss.

    As TRL's `loss_weights`: weights need not add up to 1.

    Attributes:
        losses: at least one.
        weights: as many.
    """

    losses: list[PreferenceLoss]
    weights: list[float]

    def __post_init__(self) -> None:
        if not self.losses or len(self.losses) != len(self.weights):
            raise ConfigurationError(
                f"WeightedSum has {len(self.losses)} losses and {len(self.weights)} weights, expected a weight for "
                "each loss and at least one loss"
            )

    @property
    def uses_reference(self) -> bool:  # type: ignore[override]
        """Whether one of them does."""
        return any(loss.uses_reference for loss in self.losses)

    @property
    def across_pairs(self) -> bool:  # type: ignore[override]
        """Whether one of them is."""
        return any(loss.across_pairs for loss in self.losses)

    @property
    def whole_logps(self) -> bool:  # type: ignore[override]
        """Whether one of them needs them."""
        return any(loss.whole_logps for loss in self.losses)

    def per_pair(self, policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
        """`[B]`, the weighted sum."""
        parts = [
            weight * loss.per_pair(policy, reference, beta)
            for loss, weight in zip(self.losses, self.weights, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def of_stage(self, index: int, name: str) -> PreferenceLoss:
        """The sum of what its losses are in a stage."""
        return replace(self, losses=[loss.of_stage(index, name) for loss in self.losses])

    def check_stages(self, names: Sequence[str], mergeable: Sequence[str]) -> None:
        """All of them."""
        for loss in self.losses:
            loss.check_stages(names, mergeable)

    def start_stage(self) -> None:
        """All of them."""
        for loss in self.losses:
            loss.start_stage()

    def state_dict(self) -> dict[str, Any]:
        """By position."""
        return {str(number): loss.state_dict() for number, loss in enumerate(self.losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """By position."""
        for number, loss in enumerate(self.losses):
            loss.load_state_dict(state[str(number)])


def check_loss(loss: PreferenceLoss | None, label_smoothing: float, logps: CompletionLogps) -> None:
    """Refuse settings of the loss that don't go together.

    Args:
        loss: None is the sigmoid loss.
        label_smoothing: `model.label_smoothing`, of the sigmoid loss.
        logps: `model.logps`.

    Raises:
        ConfigurationError: label smoothing outside its range, or settings that don't go together.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ConfigurationError(f"`model.label_smoothing` is {label_smoothing}, expected within [0, 0.5)")
    if loss is None:
        return
    name = type(loss).__name__
    if label_smoothing:
        raise ConfigurationError(
            f"`model.label_smoothing` is {label_smoothing} and `model.loss` is {name}; leave it out, and set "
            "`model.loss.init_args.label_smoothing` where the loss has it"
        )
    if loss.across_pairs and isinstance(logps, WPOLogps):
        raise ConfigurationError(
            f"`model.loss` is {name}, which sorts the pairs of a micro-batch, and `model.logps` {type(logps).__name__} "
            "weighs single pairs; leave one of them out"
        )
    if loss.whole_logps and isinstance(logps, SummedLogps) and logps.ld_alpha < 1:
        raise ConfigurationError(
            f"`model.loss` is {name}, a mean over whole answers, and `ld_alpha` of `model.logps` is {logps.ld_alpha}; "
            "leave one of them out"
        )


def check_stage_losses(loss: PreferenceLoss | None, staging: Staging) -> None:
    """Refuse what single stages can't have with `model.loss`.

    Args:
        loss: `model.loss`.
        staging: knows the stages and their settings.

    Raises:
        ConfigurationError: a loss of a stage that isn't there, or a stage with its own label smoothing, which only the
            default loss reads.
    """
    if loss is None:
        return
    loss.check_stages(staging.names(), staging.sources if staging.merge_ties else [])
    for key, own in staging.stage_settings.items():
        if own.label_smoothing is not None:
            raise ConfigurationError(
                f"`data.stage_settings[{key}]` has `label_smoothing` {own.label_smoothing}, and `model.loss` is "
                f"{type(loss).__name__}, which has its own for all stages; leave one of them out"
            )
