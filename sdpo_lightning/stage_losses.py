"""Rank 4: `StageLosses`, a `model.loss` that is another one in each stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sdpo_lightning.data.stage_settings import check_stage_keys, layers_of
from sdpo_lightning.objectives import PreferenceLoss, SigmoidLoss
from sdpo_lightning.types import PairLogps


@dataclass(frozen=True)
class StageLosses(PreferenceLoss):
    """A loss a stage, found as `data.stage_settings` are: by its name, else by its place ("2"), else by "*".

    Losses with a memory begin anew with each stage. A stage that none is given for has DPO's sigmoid loss.

    Attributes:
        losses: name, place or "*" -> loss.
    """

    losses: dict[str, PreferenceLoss] = field(default_factory=dict)

    @property
    def uses_reference(self) -> bool:  # type: ignore[override]
        """Whether one of them does."""
        return any(loss.uses_reference for loss in self.losses.values())

    @property
    def across_pairs(self) -> bool:  # type: ignore[override]
        """Whether one of them is."""
        return any(loss.across_pairs for loss in self.losses.values())

    @property
    def whole_logps(self) -> bool:  # type: ignore[override]
        """Whether one of them needs them."""
        return any(loss.whole_logps for loss in self.losses.values())

    def per_pair(self, policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
        """Not without a stage: see `of_stage`."""
        raise AssertionError("`of_stage` gives the loss of a stage")

    def of_stage(self, index: int, name: str) -> PreferenceLoss:
        """The loss of one stage."""
        layers = layers_of(self.losses, index, name)
        return layers[0].of_stage(index, name) if layers else SigmoidLoss()

    def check_stages(self, names: Sequence[str], mergeable: Sequence[str]) -> None:
        """Refuse a key that is no stage.

        Raises:
            ConfigurationError: naming it.
        """
        check_stage_keys("model.loss.init_args.losses", list(self.losses), names, mergeable)

    def settings(self) -> dict[str, Any]:
        """By key."""
        return super().settings() | {"losses": {key: loss.settings() for key, loss in self.losses.items()}}

    def start_stage(self) -> None:
        """All of them."""
        for loss in self.losses.values():
            loss.start_stage()

    def state_dict(self) -> dict[str, Any]:
        """By key."""
        return {key: loss.state_dict() for key, loss in self.losses.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """By key."""
        for key, loss in self.losses.items():
            loss.load_state_dict(state[key])
