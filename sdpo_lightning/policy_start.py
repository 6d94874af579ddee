"""Rank 5: what the policy is at the first step of a stage: what the last one left, or S again."""

from __future__ import annotations

import logging
from typing import Literal, get_args

from sdpo_lightning.adapters import TRAINED
from sdpo_lightning.backbone import copy_weights_
from sdpo_lightning.run_parts import StageModule
from sdpo_lightning.types import ConfigurationError, Stage

log = logging.getLogger(__name__)

PolicyStart = Literal["previous", "sft"]
_STARTS = get_args(PolicyStart)


def check_start_name(name: str) -> None:
    """Refuse a name that is none.

    Raises:
        ConfigurationError: with the known ones.
    """
    if name not in _STARTS:
        raise ConfigurationError(f"`model.policy_starts_at` is {name!r}, expected one of {_STARTS}")


def start_policy_(pl_module: StageModule, stage: Stage) -> int:
    """Make the policy what `model.policy_starts_at` asks for. A collective.

    With `sft` every stage trains S anew against the reference, which the stage before has moved
    (arXiv 2403.19270, section 4.5).

    Args:
        pl_module: its policy is M_{t-1}, and the reference has advanced.
        stage: stage t.

    Returns:
        Index of the M_t that the policy is now.

    Raises:
        ConfigurationError: S can't be read any more.
    """
    if stage.index == 1 or pl_module.policy_starts_at == "previous":
        return stage.index - 1
    if pl_module.first_adapter is not None:
        pl_module.first_adapter.write_(pl_module.trained.model, TRAINED)
    else:
        copy_weights_(pl_module.trained, pl_module.read_model(None))
    log.info("stage %d: the policy is S again", stage.index)
    return 0
