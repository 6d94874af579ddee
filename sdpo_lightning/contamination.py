"""Rank 5: has the reference been trained on the pairs that it scores? (arXiv 2403.19270, section 4.4)

A reference that has seen a pair prefers its chosen answer more than it would otherwise. So the change of gamma since S,
per token, is compared between the pairs that a stage trains on and the held-out pairs of the same source.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from sdpo_lightning.data.pair_lists import data_of
from sdpo_lightning.files import write_json
from sdpo_lightning.run_parts import StageModule, is_try, stage_module
from sdpo_lightning.types import PairLogps, PreferenceBatch

log = logging.getLogger(__name__)

# Standard errors of the difference above which pairs count as memorised.
LIMIT = 3.0


@dataclass
class Finding:
    """Change of gamma since S, nats per token, of one source in one stage.

    Attributes:
        stage: its index.
        source: name.
        train: mean over the stage's pairs.
        held_out: mean over the source's held-out pairs.
        standard_error: of the difference.
        pairs: of both kinds.
    """

    stage: int
    source: str
    train: float
    held_out: float
    standard_error: float
    pairs: tuple[int, int]

    @property
    def is_memorised(self) -> bool:
        """Whether the stage's pairs stand out."""
        return self.train - self.held_out > LIMIT * self.standard_error > 0


def gamma_change(reference: PairLogps, sft: PairLogps) -> Tensor:
    """Change of gamma from S to the reference, each answer per token.

    Args:
        reference: logps `[B]`.
        sft: logps of S, `[B]`.

    Returns:
        `[B]`, nats per token.
    """
    chosen = (reference.chosen - sft.chosen) / reference.chosen_lengths
    rejected = (reference.rejected - sft.rejected) / reference.rejected_lengths
    return (chosen - rejected).double()


def compare(stage: int, source: str, train: Tensor, held_out: Tensor) -> Finding | None:
    """Compare two groups of pairs.

    Args:
        stage: its index.
        source: name.
        train: `[3]`: count, sum and sum of squares.
        held_out: `[3]`, likewise.

    Returns:
        None where a group has fewer than two pairs.
    """
    if train[0] < 2 or held_out[0] < 2:
        return None
    (mean, error), (mean_out, error_out) = (_mean_and_error(group) for group in (train, held_out))
    pairs = round(train[0].item()), round(held_out[0].item())
    return Finding(stage, source, mean, mean_out, math.hypot(error, error_out), pairs)


def _mean_and_error(sums: Tensor) -> tuple[float, float]:
    count, total, squares = sums.tolist()
    mean = total / count
    variance = max(0.0, squares - count * mean**2) / (count - 1)
    return mean, math.sqrt(variance / count)


class ContaminationGuard(pl.Callback):
    """Warns of a reference that has memorised the pairs of its stage; leaves `contamination.json`.

    Needs logps of S, so an order by M_0, and held-out pairs; without them it says nothing. Of a pass that was resumed
    it sees the pairs that were left.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._findings: list[Finding] = []

    def state_dict(self) -> dict[str, Any]:
        """What was found so far."""
        return {"findings": [asdict(finding) for finding in self._findings]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what was found."""
        self._findings = [Finding(**row | {"pairs": tuple(row["pairs"])}) for row in state_dict["findings"]]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Each pass counts on its own."""
        self._sums.clear()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        """Count the pairs of a micro-batch."""
        pl_module = stage_module(pl_module)
        self._add("train", pl_module, batch)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Each validation sees the same pairs: only the last one counts."""
        self._sums = {key: sums for key, sums in self._sums.items() if key[0] == "train"}

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: PreferenceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count held-out pairs."""
        pl_module = stage_module(pl_module)
        if trainer.state.fn == "fit":
            self._add("held_out", pl_module, batch)

    def _add(self, kind: str, pl_module: StageModule, batch: PreferenceBatch) -> None:
        if pl_module.m0_logps is None or pl_module.last_logps is None:
            return
        sft, known = pl_module.m0_logps.lookup(batch.pair_id)
        change = gamma_change(pl_module.last_logps[1], sft)
        counted = known & (batch.weights > 0)
        for index in torch.unique(batch.pair_id[counted] >> 40).tolist():
            values = change[counted & (batch.pair_id >> 40 == index)]
            sums = torch.stack([torch.ones_like(values), values, values**2]).sum(1).cpu()
            if kind == "train":
                # A repeated pair tells no more than it does once.
                sums /= data_of(pl_module.trainer).sources[index].repeat
            self._sums[kind, index] = self._sums.get((kind, index), torch.zeros(3, dtype=torch.float64)) + sums

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the first pass of a stage: compare and say what stands out."""
        pl_module = stage_module(pl_module)
        stage = pl_module.stage_under_way
        if trainer.current_epoch != stage.first_epoch or pl_module.m0_logps is None or not trainer.is_last_batch:
            return
        for index, source in enumerate(data_of(trainer).sources):
            groups = [self._over_ranks(trainer, (kind, index)) for kind in ("train", "held_out")]
            finding = compare(stage.index, source.name, *groups)
            if finding is not None:
                self._findings.append(finding)
                self._report(finding)
        if trainer.is_global_zero and not is_try(trainer):
            rows = [asdict(finding) | {"is_memorised": finding.is_memorised} for finding in self._findings]
            write_json(Path(trainer.default_root_dir) / "contamination.json", {"findings": rows})

    def _over_ranks(self, trainer: pl.Trainer, key: tuple[str, int]) -> Tensor:
        sums = self._sums.get(key, torch.zeros(3, dtype=torch.float64)).to(trainer.strategy.root_device)
        return trainer.strategy.reduce(sums, reduce_op="sum").cpu()

    @staticmethod
    def _report(finding: Finding) -> None:
        if not finding.is_memorised:
            return
        log.warning(
            "stage %d: the reference prefers the chosen answers of its %d pairs of %r by %.2g nats a token more than "
            "those of the %d held-out ones (%.1f standard errors): it has probably been trained on "
            "them; use a reference that hasn't (`model.reference`), or other pairs",
            finding.stage,
            finding.pairs[0],
            finding.source,
            finding.train - finding.held_out,
            finding.pairs[1],
            (finding.train - finding.held_out) / finding.standard_error,
        )
