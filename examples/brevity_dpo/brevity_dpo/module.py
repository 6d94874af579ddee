"""A module with a setting of our own."""

from typing import Any

from brevity_dpo.loss import BrevityLoss
from sdpo_lightning import DPOLitModule


class BrevityModule(DPOLitModule):
    """`DPOLitModule` with the loss of this project; all other settings stay on the command line.

    Args:
        alpha: see `BrevityLoss`.
    """

    def __init__(self, model_name_or_path: str, alpha: float = 0.01, **others: Any) -> None:
        super().__init__(model_name_or_path, loss=BrevityLoss(alpha), **others)
