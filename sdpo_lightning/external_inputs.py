"""Rank 6: what a reference that is no M_t is given before the policy is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from sdpo_lightning.backbone import CausalBackbone, load_policy
from sdpo_lightning.data.collate import PaddedCollator
from sdpo_lightning.data.foreign import ForeignRows, WithLengthsOf
from sdpo_lightning.data.loader import PairStore, StageLoader
from sdpo_lightning.data.pair_lists import data_of
from sdpo_lightning.data.passes import Batching, Passes
from sdpo_lightning.data.prepare import load_tokenizer
from sdpo_lightning.loading import load_on_ranks
from sdpo_lightning.ranks import side_by_side
from sdpo_lightning.run_parts import StageModule, run_dir
from sdpo_lightning.scoring import numerics
from sdpo_lightning.strategy import sharding_of
from sdpo_lightning.types import ConfigurationError, ExternalInputs, PreferenceBatch, QuantizationName, ReferenceInputs


def load_external(pl_module: StageModule) -> None:
    """Let the reference do what it has to before the policy is there, and record its model. A collective.

    Raises:
        ConfigurationError: the model or its tokenizer can't be had, or can't score these pairs.
    """
    trainer = pl_module.trainer
    if trainer.state.fn == TrainerFn.FITTING and not trainer.limit_train_batches:
        # The verb `rank` needs S alone.
        return
    inputs = ExternalInputs(
        load=lambda name, quantization: _load(pl_module, name, quantization),
        score=pl_module.score,
        pairs=lambda tokenizer, max_length: _pairs(trainer, pl_module, tokenizer, max_length),
    )
    device = trainer.strategy.root_device
    # A start that finds a table draws no random numbers; one that makes it must not shift those of the run.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        found = pl_module.reference.before_policy(inputs)
    if found is not None:
        pl_module.record.digests[-1], pl_module.record.folders[-1] = found.digest, found.name


def _load(pl_module: StageModule, name: str, quantization: QuantizationName | None) -> nn.Module:
    """A frozen model beside the policy: as it is loaded, but for the adapters."""
    strategy = pl_module.trainer.strategy

    def load() -> CausalBackbone:
        if quantization is None and pl_module.quantization is None:
            weights = pl_module.load_weights(name)
        else:
            weights = load_policy(name, pl_module.disable_dropout, pl_module.logits_budget_mb, quantization)
        return pl_module.execution.apply(weights)

    if quantization is None:
        skeleton = lambda: pl_module.execution.apply(pl_module.load_skeleton(name))  # noqa: E731
        model = load_on_ranks(load, skeleton, strategy.root_device, sharding_of(strategy))
    else:
        model = load()
    return model.to(strategy.root_device).requires_grad_(False).eval()


def _pairs(
    trainer: pl.Trainer, pl_module: StageModule, tokenizer: str | None, max_length: int | None
) -> ReferenceInputs:
    """See `ExternalInputs.pairs`; refuses pairs that are made just before their stage."""
    data = data_of(trainer)
    if data.made.names:
        raise ConfigurationError(
            f"`model.reference` scores all pairs before stage 1, and those of `data.pair_sources` {data.made.names} "
            "don't exist yet; use ExternalReference, which scores them as they come, or leave one of them out"
        )
    ids, folder = data.train_ids() + data.val_ids(), run_dir(trainer) / "references"
    how = f"{numerics(trainer, pl_module)} {max_length}"
    if tokenizer is None:
        own = _Lazy(trainer, data.store, None, data.pad_token_id, ids)
        return ReferenceInputs(own, lambda: data.store.digest(ids), "", folder, how)
    other = side_by_side(lambda: load_tokenizer(tokenizer))
    end = data.tokenizer.eos_token
    rows = ForeignRows(data.sources, data.on_bad_row, other, tokenizer, max_length, end)
    pad = 0 if other.pad_token_id is None else other.pad_token_id
    return ReferenceInputs(
        _Lazy(trainer, data.store, rows, pad, ids), lambda: side_by_side(lambda: rows.digest(ids)), "", folder, how
    )


@dataclass(frozen=True, eq=False)
class _Lazy:
    """Padded batches of all pairs, tokenised when they are asked for: a table that is found needs none."""

    trainer: pl.Trainer
    own: PairStore
    foreign: ForeignRows | None
    pad_token_id: int
    ids: Sequence[int]

    def __iter__(self) -> Iterator[PreferenceBatch]:
        # No generator: what can't be tokenised is refused at once, before a model is loaded.
        if self.foreign is None:
            return iter(self._batches(self.own))
        rows = self.foreign
        return iter(WithLengthsOf(self._batches(side_by_side(lambda: rows.store(self.ids))), self.own))

    def _batches(self, store: PairStore) -> StageLoader:
        trainer, batching = self.trainer, data_of(self.trainer).batching
        collator = PaddedCollator(self.pad_token_id, batching.pad_to_multiple_of)
        assert isinstance(batching, Batching)
        passes = Passes(store, collator, batching, trainer.global_rank, trainer.world_size, accumulate=1, limit=1.0)
        return passes.longest_first(self.ids)
