"""Rank 5: references that stay M_0 in every stage: stages, their order and their restarts without the swap.

The control that isolates the swap of stepwise DPO (arXiv 2403.19270, section 3.2). Plain DPO itself, without stages,
is `data.partition: pooled`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdpo_lightning.adapter_reference import AdapterReference
from sdpo_lightning.backbone import CausalBackbone
from sdpo_lightning.reference import CachedReference, ReferencePolicy, ResidentReference
from sdpo_lightning.types import ReferenceInputs, Stage


class StaysFirst(ReferencePolicy):
    """Put before another reference, makes it stay what it was in stage 1."""

    def model_index(self, stage: Stage) -> int:
        """M_0."""
        return 0

    def settings(self) -> dict[str, Any]:
        """M_0, whichever way it is held."""
        return {"model.reference": "M_0"}

    def advance(self, policy: CausalBackbone, stage: Stage, inputs: ReferenceInputs) -> None:
        """Take the policy in stage 1, when it is M_0; afterwards nothing. A fork has restored M_0 before."""
        if stage.index == 1:
            # That of the reference it is put before.
            super().advance(policy, stage, inputs)  # type: ignore[safe-super]

    def stay(self, stage: Stage, inputs: ReferenceInputs) -> None:
        """It always does."""


class FixedReference(StaysFirst, ResidentReference):
    """M_0 throughout, as a second, frozen copy of the model: one forward a pair an epoch.

    Args:
        offload: keep its weights in the memory of the CPU between forward passes.
    """


class FixedAdapterReference(StaysFirst, AdapterReference):
    """M_0 throughout with `model.lora`: the frozen adapter keeps its first values, whose product is 0."""


class CachedFixedReference(StaysFirst, CachedReference):
    """M_0 throughout, as two floats a pair: one pass of the policy over the pairs of all stages when stage 1 begins.

    Later M_0 is gone; the table is kept, and a resumed run reads it.
    """

    def covered(self, stage: Stage, stages: Sequence[Stage]) -> Sequence[Stage]:
        """All stages."""
        return stages

    def table_path(self, folder: Path, stage: Stage) -> Path:
        """One table for all stages."""
        return folder / "fixed.safetensors"
