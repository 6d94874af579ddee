"""Rank 4: which weights of a stage become M_t.

They stand in the policy before the checkpoint of the stage's end is made. So that checkpoint, the export, the digest,
the next reference and a fork all see one model, and know nothing of the choice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from sdpo_lightning.types import Stage


class StageWeights(ABC):
    """Chooses among the weights that a stage passes through. A subclass says how.

    Attributes:
        monitor: name of a logged metric that it is told after each validation, as in `StopRule`; None is none.
    """

    monitor: str | None = None

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Plain values that a resumed run must agree on."""

    def check(self, trainer: pl.Trainer) -> None:  # noqa: B027
        """Refuse what it can't work with, before any weights are loaded."""

    def begin_stage(self) -> None:  # noqa: B027
        """Forget the stage before."""

    def go_on(self, trainer: pl.Trainer) -> None:  # noqa: B027
        """After `load_state_dict`, before the first step of a resumed run. A collective."""

    def after_validation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, value: float | None) -> None:  # noqa: B027
        """Look at the policy. A collective.

        Args:
            trainer: gives step and run directory.
            pl_module: holds the policy.
            value: of `monitor`, the same on all ranks; None where there is no monitor.
        """

    def choose_(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:  # noqa: B027
        """Write the chosen weights into the policy, at the end of a stage. A collective."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Go on with what a checkpoint holds."""


class LastOfStage(StageWeights):
    """The weights after the last step; the default, as in the paper."""

    def settings(self) -> dict[str, Any]:
        """Nothing but which one it is."""
        return {"class": "LastOfStage"}
