"""Rank 5: logps of the model that the difficulty of a pair is measured against."""

from __future__ import annotations

import logging

import lightning.pytorch as pl

from sdpo_lightning.data.pair_lists import data_of
from sdpo_lightning.exactness import layout_problem
from sdpo_lightning.logp_tables import score_pairs
from sdpo_lightning.run_parts import StageModule
from sdpo_lightning.types import ConfigurationError, LogpTable

log = logging.getLogger(__name__)


def score_by_reference(trainer: pl.Trainer, pl_module: StageModule) -> LogpTable | None:
    """Score the ranked pairs by `data.difficulty_reference`, which is loaded for this pass alone. A collective.

    Returns:
        None where no such model is given.

    Raises:
        ConfigurationError: the layout in use isn't exact for that model.
    """
    data = data_of(trainer)
    path = data.difficulty_reference
    if path is None:
        return None
    log.info("scoring %d pairs by `data.difficulty_reference`", len(data.ranking_ids()))
    model = pl_module.load_model(path).to(pl_module.device)
    # Of a model that is cut, or frozen in bf16, there is no plain forward to compare with.
    problem = layout_problem(model, data.collator) if pl_module.exact_layout is None else ""
    if problem:
        name = type(data.collator).__name__
        found = f"`data.difficulty_reference`: {name} isn't exact for it ({problem})"
        raise ConfigurationError(f"{found}; set `data.layout`, `padded` at last")
    return score_pairs(model, data.batches(data.ranking_ids()), pl_module.score, title="ranking by the other model")
