"""Rank 5: what a reference is asked and given before any weights are loaded."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from sdpo_lightning.completion_logps import SummedLogps
from sdpo_lightning.data.pair_lists import Report, data_of
from sdpo_lightning.ranks import from_first_rank
from sdpo_lightning.run_parts import StageModule
from sdpo_lightning.strategy import sharding_of
from sdpo_lightning.types import RunFacts


def check_reference(trainer: pl.Trainer, pl_module: StageModule) -> None:
    """Ask the reference whether it goes with this run.

    Raises:
        ConfigurationError: it doesn't.
    """
    data = data_of(trainer)
    facts = RunFacts(
        sharded=sharding_of(trainer.strategy) is not None,
        adapters=pl_module.lora is not None,
        tokenizer=data.tokenizer,
        needs_own_lengths=needs_own_lengths(pl_module),
        rows_cut={report.name: cut for report in data.reports.values() if (cut := _cut(report))},
    )
    from_first_rank(lambda: pl_module.reference.check(facts))


def needs_own_lengths(pl_module: Any) -> bool:
    """Whether loss or logps use single tokens or lengths, which another tokenizer's reference doesn't share.

    Known of an overridden `compute_logps`, and of `model.logps` that weigh tokens. A `preference_loss` of one's own is
    trusted with sums; the lengths that it is given are the policy's on both sides.
    """
    weighs_tokens = pl_module.logps.settings() != SummedLogps().settings()
    return weighs_tokens or type(pl_module).compute_logps.__qualname__ != "DPOLitModule.compute_logps"


def _cut(report: Report) -> int:
    return sum(count for mark, count in report.marks.items() if mark.removeprefix("val_").endswith("_cut"))
