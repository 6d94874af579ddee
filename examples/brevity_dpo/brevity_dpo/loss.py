"""A loss of our own."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from sdpo_lightning import PairLogps
from sdpo_lightning.objectives import PreferenceLoss


@dataclass(frozen=True)
class BrevityLoss(PreferenceLoss):
    """R-DPO (arXiv 2403.19159): of a preference, what the lengths explain needn't be learned.

    Attributes:
        alpha: nats a token of the difference in length; 0 is DPO. A run can't be resumed under another one.
    """

    alpha: float = 0.01

    def per_pair(self, policy: PairLogps, reference: PairLogps, beta: float) -> Tensor:
        """-log sigmoid(beta (gamma - gamma_ref) + alpha (|y_w| - |y_l|)), `[B]`."""
        longer = policy.chosen_lengths - policy.rejected_lengths
        return -F.logsigmoid(beta * (policy.gamma - reference.gamma) + self.alpha * longer)
