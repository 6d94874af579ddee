"""Rank 9: our side of `parity`, a program of its own: `python -m sdpo_lightning.parity_ours CONFIG STEPS OUT`.

An ordinary `fit` of the first steps of each stage, which also writes down the ids of the pairs that it has trained on.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from sdpo_lightning.backbone import CausalBackbone
from sdpo_lightning.cli import CurriculumCLI
from sdpo_lightning.data.datamodule import CurriculumDataModule
from sdpo_lightning.memory import peak_resident
from sdpo_lightning.module import DPOLitModule
from sdpo_lightning.parity_trl import now
from sdpo_lightning.types import Chunk, ConfigurationError, ReferenceInputs, Stage

_BLOCK = 256


class FirstSteps(CurriculumDataModule):
    """Of each stage the pairs of its first whole steps, but for those of which TRL would score other tokens."""

    steps = 20

    def partition(self, scores: Mapping[str, Tensor]) -> list[Chunk]:
        """Cut the chunks short.

        Raises:
            ConfigurationError: a source that has less than a step.
        """
        assert self.trainer is not None
        a_step = self.batching.batch_size * self.trainer.accumulate_grad_batches
        chunks = []
        for chunk in super().partition(scores):
            ids = [i for i, _ in zip(self._plain(chunk.pair_ids), range(self.steps * a_step), strict=False)]
            if not (whole := len(ids) // a_step * a_step):
                raise ConfigurationError(
                    f"`parity`: source {chunk.name!r} has {len(ids)} pairs, less than a step of {a_step}; lower "
                    "`data.batch_size` or `trainer.accumulate_grad_batches`, or leave the source out"
                )
            chunks.append(Chunk(chunk.name, ids[:whole]))
        return chunks

    def _plain(self, ids: Sequence[int]) -> Iterator[int]:
        for start in range(0, len(ids), _BLOCK):
            block = ids[start : start + _BLOCK]
            for pair_id, pair in zip(block, self.store.get(block), strict=True):
                if not pair.chosen_unscored and not pair.rejected_unscored:
                    yield pair_id


class TimedModule(DPOLitModule):
    """Measures its steps, and what a reference does at a boundary."""

    seconds = 0.0

    def configure_model(self) -> None:
        """Load S, and time the reference from then on."""
        super().configure_model()
        advance = self.reference.advance

        def timed(policy: CausalBackbone, stage: Stage, inputs: ReferenceInputs) -> None:
            began = now()
            advance(policy, stage, inputs)
            self.seconds += now() - began

        self.reference.advance = timed  # type: ignore[method-assign]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Behind the callbacks, which may have been at a boundary."""
        self._began = now()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Behind the callbacks, which have logged, as TRL's step does."""
        self.seconds += now() - self._began


def main(config: str, steps: str, out: str) -> None:
    """Train, and write what was measured.

    Args:
        config: file of `fit`.
        steps: optimizer steps a stage.
        out: the file to write.
    """
    FirstSteps.steps = int(steps)
    imported = peak_resident()
    cli = CurriculumCLI(TimedModule, FirstSteps, ["fit", "--config", config])
    cuda = torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0
    peak = torch.cuda.max_memory_allocated() if cuda else peak_resident() - imported
    Path(out).write_text(json.dumps(_figures(cli.trainer, cli.model, cli.datamodule) | {"peak": peak}))


def _figures(trainer: pl.Trainer, module: TimedModule, data: FirstSteps) -> dict[str, Any]:
    with (Path(trainer.default_root_dir) / "metrics.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    found: dict[str, Any] = {"losses": {}, "grad_norms": {}, "seconds": module.seconds, "pairs": 0, "stages": []}
    for stage in data.stages():
        own = [row for row in rows if float(row["stage/index"]) == stage.index]
        found["losses"][stage.name] = [float(row["train/loss"]) for row in own]
        found["grad_norms"][stage.name] = [float(row["train/grad_norm"]) for row in own]
        found["pairs"] += len(stage.pair_ids)
        pairs = data.store.get(list(stage.pair_ids))
        ids = [
            {"prompt_ids": p.prompt_ids, "chosen_ids": p.chosen_ids, "rejected_ids": p.rejected_ids} for p in pairs
        ]
        found["stages"].append({"name": stage.name, "pairs": ids})
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
