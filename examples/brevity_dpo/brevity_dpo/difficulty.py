"""A score of difficulty of our own."""

import torch
from torch import Tensor

from sdpo_lightning import PairLogps

NATS = 1.0


def decided(logps: PairLogps) -> Tensor:
    """Gamma `[P]` of the pairs that M_0 has an opinion about; NaN for the others, which then don't count.

    Higher is easier, above 0 counts as right.
    """
    return torch.where(logps.gamma.abs() >= NATS, logps.gamma, torch.nan)
