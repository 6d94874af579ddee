"""Rank 5: before a stage begins: what is left is scored by M_{t-1}, and the stage's chunk is taken from it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from sdpo_lightning.data.pair_lists import PairLists, data_of
from sdpo_lightning.data.reordering import accuracies, score_by_id
from sdpo_lightning.data.staging import RankedBy
from sdpo_lightning.logp_tables import score_pairs
from sdpo_lightning.ranks import from_first_rank
from sdpo_lightning.run_parts import stage_module
from sdpo_lightning.types import Chunk, ConfigurationError, LogpTable

log = logging.getLogger(__name__)


def rank_again(trainer: pl.Trainer, chunks: Sequence[Chunk], index: int) -> tuple[list[Chunk], dict[str, Any]]:
    """The chunks of stage t and of those behind it, made anew of the pairs that no stage has had. A collective.

    The policy is M_{t-1} now: the last pass of stage t-1 is over, and a resumed run has restored it.

    Args:
        trainer: of the run.
        chunks: of all stages, in training order.
        index: t, from 2.

    Returns:
        The chunks of all stages, and what is to be recorded of the decision, as plain values.

    Raises:
        ConfigurationError: a score that isn't finite, or pairs without one.
    """
    data, module, decided = data_of(trainer), stage_module(trainer.lightning_module), index - 1
    left = {i for chunk in chunks[decided:] for i in chunk.pair_ids}
    ranked = {name: [i for i in own if i in left] for name, own in zip(data.reports, data.ranked_ids(), strict=True)}
    ids = [i for part in ranked.values() for i in part]
    log.info("stage %d: scoring the %d pairs that are left by M_%d", index, len(ids), decided)
    table = score_pairs(module.trained, data.batches(ids), module.score)

    # One rank decides: the numerics of another machine might order two pairs the other way.
    found = from_first_rank(lambda: _pair_scores(data, table, ids, decided))
    own = dict(zip(ranked, found.split([len(part) for part in ranked.values()]), strict=True))
    scores = score_by_id(ranked, own)
    made = data.staging.ranked_again(chunks, decided, scores)
    rest = {name: round(value, 6) for name, value in accuracies(made[decided:], scores).items()}
    log.info("stage %d is %r; accuracy of M_%d: %s", index, made[decided].name, decided, rest)
    return made, {"stage": index, "ranked_by": f"M_{decided}", "pairs": len(ids), "accuracy": rest}


def _pair_scores(data: PairLists, table: LogpTable, ids: list[int], decided: int) -> Tensor:
    logps, known = table.lookup(torch.tensor(ids))
    assert bool(known.all()), "the pass left pairs out"
    if not bool((logps.chosen.isfinite() & logps.rejected.isfinite()).all()):
        raise ConfigurationError(
            f"M_{decided} gives a score that isn't finite; lower the learning rate (`model.optimizer`), or leave "
            "`data.ranked_by: previous` out"
        )
    return data.pair_scores(logps)


def check_ranked_by(ranked_by: RankedBy, difficulty_reference: str | None) -> None:
    """Refuse a ranking by M_{t-1} against another model, which is loaded for M_0's ranking alone.

    Raises:
        ConfigurationError: naming both settings.
    """
    if ranked_by == "previous" and difficulty_reference is not None:
        raise ConfigurationError(
            "`data.ranked_by: previous` with `data.difficulty_reference`, which is loaded once, before stage 1; leave "
            "one of them out"
        )
