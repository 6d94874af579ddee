"""A reference of our own."""

from dataclasses import replace
from typing import Any

from sdpo_lightning import PairLogps, PreferenceBatch, ResidentReference


class SoftenedReference(ResidentReference):
    """M_{t-1} to the power of `share`: 1 is stepwise DPO, 0 no reference at all.

    Swap, resume and the check that it is M_{t-1} are those of the base class.

    Args:
        share: factor on its logps.
    """

    # At the first step of a stage its logps aren't the policy's, so the self-check compares the weights alone.
    starts_at_policy = False

    def __init__(self, share: float = 0.5) -> None:
        super().__init__()
        self.share = share

    def settings(self) -> dict[str, Any]:
        """A run can't be resumed under another share."""
        return super().settings() | {"model.reference.share": self.share}

    def logps(self, batch: PreferenceBatch) -> PairLogps:
        """Logps `[B]` of M_{t-1}, softened."""
        logps = super().logps(batch)
        return replace(logps, chosen=self.share * logps.chosen, rejected=self.share * logps.rejected)
