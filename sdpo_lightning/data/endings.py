"""Rank 1: stages that ended before their plan did, and the plan that follows from them. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sdpo_lightning.types import Stage


@dataclass(frozen=True)
class StageEnd:
    """Where a stop rule ended a stage.

    Attributes:
        epoch_steps: optimizer steps of each pass that was begun; the last one may have been cut.
        pairs: that were trained on, over all these passes.
        reason: in words.
    """

    epoch_steps: tuple[int, ...]
    pairs: int
    reason: str

    def row(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"epoch_steps": list(self.epoch_steps)}

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> StageEnd:
        """From plain values."""
        return cls(tuple(row["epoch_steps"]), row["pairs"], row["reason"])


def with_ends(stages: Sequence[Stage], ends: Mapping[int, StageEnd]) -> list[Stage]:
    """The plan in which some stages have ended early: the stages after them begin earlier.

    Args:
        stages: as planned.
        ends: index of a stage -> where it ended.

    Returns:
        Stages whose epochs follow each other without a gap.
    """
    found: list[Stage] = []
    for stage in stages:
        steps = ends[stage.index].epoch_steps if stage.index in ends else stage.epoch_steps
        first = found[-1].first_epoch + found[-1].epochs if found else 0
        found.append(replace(stage, epoch_steps=steps, first_epoch=first))
    return found


def last_epoch(stages: Sequence[Stage]) -> int:
    """Epochs of all stages together."""
    return stages[-1].first_epoch + stages[-1].epochs


def pairs_trained(stages: Sequence[Stage], ends: Mapping[int, StageEnd]) -> int:
    """Pairs of all passes of some stages.

    Args:
        stages: finished ones.
        ends: index of a stage -> where it ended, of those that ended early.
    """
    whole = (stage.epochs * len(stage.pair_ids) for stage in stages if stage.index not in ends)
    return sum(whole) + sum(ends[stage.index].pairs for stage in stages if stage.index in ends)
