"""Rank 5: passes over pairs without gradients: M_0's for the ranking, and what a reference is given at a boundary."""

from __future__ import annotations

import logging
from pathlib import Path

import lightning.pytorch as pl

from sdpo_lightning.data.pair_lists import data_of
from sdpo_lightning.exactness import COLLATORS, exact_layout
from sdpo_lightning.logp_tables import cache_key, read_table, score_pairs, write_table
from sdpo_lightning.ranks import from_first_rank
from sdpo_lightning.run_parts import StageModule, run_dir
from sdpo_lightning.types import LogpTable, ReferenceInputs, Stage

log = logging.getLogger(__name__)


def set_layout(trainer: pl.Trainer, pl_module: StageModule) -> None:
    """Decide the batch form, now that the model is there to say whether `data.layout` is exact for it."""
    data = data_of(trainer)
    multiple = data.batching.pad_to_multiple_of
    # A sharded model was looked at when it was read.
    name = pl_module.exact_layout or exact_layout(pl_module.trained, data.layout, multiple)
    data.collator = COLLATORS[name](data.pad_token_id, multiple)


def score_by_m0(trainer: pl.Trainer, pl_module: StageModule) -> None:
    """Have M_0's logps of the pairs to rank: by a pass, or in a fork from its parent where they are the same."""
    inputs = _m0_inputs(trainer, pl_module)
    key, table = cache_key(inputs), None
    if pl_module.fork is not None:
        parents = Path(pl_module.fork.run) / _m0_path(trainer).relative_to(run_dir(trainer))
        table = from_first_rank(lambda: read_table(parents, key))
    if table is None:
        log.info("scoring %d pairs by M_0", len(data_of(trainer).ranking_ids()))
        table = score_pairs(pl_module.trained, inputs.batches, pl_module.score, title="ranking by M_0")
    pl_module.m0_logps = table
    if trainer.limit_train_batches:
        from_first_rank(lambda: write_table(_m0_path(trainer), table, key))


def read_m0(trainer: pl.Trainer, pl_module: StageModule) -> None:
    """Take up M_0's logps again, in a run that goes on."""
    if data_of(trainer).needs_ranking:
        key = cache_key(_m0_inputs(trainer, pl_module))
        pl_module.m0_logps = from_first_rank(lambda: read_table(_m0_path(trainer), key))


def stage_inputs(trainer: pl.Trainer, pl_module: StageModule, stage: Stage) -> ReferenceInputs:
    """What the reference of a stage may need: the chunk's pairs and all held-out ones."""
    record, reference, data = pl_module.record, pl_module.reference, data_of(trainer)
    # Before the stage is entered it is about to be that model; a resumed one may have been held back.
    index = record.reference if record.entered == stage.index else reference.model_index(stage)
    known = pl_module.m0_logps if index == 0 else None
    parts = [data.reference_ids(part) for part in reference.covered(stage, data.stages())]
    # The same table whatever order later stages are given by `data.ranked_by: previous`.
    ids = parts[0] if len(parts) == 1 else sorted({i for part in parts for i in part})
    return _inputs(trainer, pl_module, ids, record.digests[index], run_dir(trainer) / "references", known)


def evaluation_inputs(trainer: pl.Trainer, pl_module: StageModule, ids: list[int]) -> ReferenceInputs:
    """What the reference needs for other pairs, outside of `fit`."""
    digest = pl_module.record.digests[pl_module.record.reference]
    return _inputs(trainer, pl_module, ids, digest, run_dir(trainer) / "references" / "evaluation")


def _m0_inputs(trainer: pl.Trainer, pl_module: StageModule) -> ReferenceInputs:
    ids = data_of(trainer).ranking_ids()
    return _inputs(trainer, pl_module, ids, pl_module.record.digests[0], run_dir(trainer) / "references")


def _inputs(
    trainer: pl.Trainer,
    pl_module: StageModule,
    ids: list[int],
    digest: str,
    folder: Path,
    known: LogpTable | None = None,
) -> ReferenceInputs:
    data = data_of(trainer)
    return ReferenceInputs(
        batches=data.batches(ids),
        rows_digest=lambda: data.store.digest(ids),
        policy_digest=digest,
        folder=folder,
        numerics=numerics(trainer, pl_module),
        known=known,
    )


def numerics(trainer: pl.Trainer, pl_module: StageModule) -> str:
    """What logps depend on beside weights and rows: precision, layout, and the function that gives them."""
    logps = type(pl_module).compute_logps
    names = (str(trainer.precision), type(data_of(trainer).collator).__name__, logps.__module__, logps.__qualname__)
    return " ".join([*names, str(pl_module.logps.settings())])


def _m0_path(trainer: pl.Trainer) -> Path:
    return run_dir(trainer) / "references" / "m0.safetensors"
