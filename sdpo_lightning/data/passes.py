"""Rank 4: passes over a chunk: which pair comes when, and how many optimizer steps that makes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import numpy as np

from sdpo_lightning.data.batching import check_batching, fewest_runs
from sdpo_lightning.data.collate import PreferenceCollator
from sdpo_lightning.data.curriculum import stage_plan, steps_per_epoch
from sdpo_lightning.data.endings import StageEnd
from sdpo_lightning.data.loader import PairStore, StageLoader, bucketed_order, epoch_order, paced_order, row_limit
from sdpo_lightning.data.pacing import Pacing, check_pacing
from sdpo_lightning.data.staging import Staging
from sdpo_lightning.loop_progress import ACCUMULATE, AT_ONCE
from sdpo_lightning.types import Chunk, ResumeError, Stage, StageSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batching:
    """The settings of `data` that order the pairs of a pass and fill the micro-batches.

    Attributes:
        batch_size: pairs per rank and micro-batch.
        batch_tokens: most tokens per rank and micro-batch, instead of `batch_size`.
        bucket_window: optimizer steps among which pairs of like length are brought together.
        pad_to_multiple_of: of row lengths.
        shuffle: anew each pass.
        seed: of the shuffles.
        pacing: how the pool grows from which a stage's first pass is drawn; None: it holds all from the start.

    Raises:
        ConfigurationError: one outside its range, or two that have no meaning together.
    """

    batch_size: int
    batch_tokens: int | None
    bucket_window: int
    pad_to_multiple_of: int
    shuffle: bool
    seed: int
    pacing: Pacing | None = None

    def __post_init__(self) -> None:
        check_batching(self.batch_tokens, self.bucket_window, self.pad_to_multiple_of, self.shuffle)
        check_pacing(self.pacing, self.bucket_window, self.shuffle)

    def plan(self, world_size: int) -> dict[str, Any]:
        """What a resumed run must agree on."""
        by_tokens = self.batch_tokens is not None
        return {
            AT_ONCE: (1 if by_tokens else self.batch_size) * world_size,
            "data.batch_tokens": self.batch_tokens,
            "data.pad_to_multiple_of": self.pad_to_multiple_of if by_tokens else None,
            "data.bucket_window": self.bucket_window,
            "data.shuffle": self.shuffle,
            "data.seed": self.seed,
            "data.pacing": None if self.pacing is None else self.pacing.settings(),
        }


@dataclass(frozen=True)
class Passes:
    """Loaders of passes over some pairs, this rank's share.

    Attributes:
        store: where the ids of a pair are found.
        collator: the layout, which says what a pair costs.
        batching: settings of `data`.
        rank: of this process.
        world_size: processes.
        accumulate: `trainer.accumulate_grad_batches`.
        limit: `trainer.limit_train_batches`; an int is a number, a float a share.
        weights: place of a source -> weight of its pairs in training.
    """

    store: PairStore
    collator: PreferenceCollator
    batching: Batching
    rank: int
    world_size: int
    accumulate: int
    limit: float
    weights: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        trainer: pl.Trainer,
        store: PairStore,
        collator: PreferenceCollator,
        batching: Batching,
        weights: Mapping[int, float],
    ) -> Passes:
        """Those of a Trainer's rank."""
        place = (trainer.global_rank, trainer.world_size)
        limits = (trainer.accumulate_grad_batches, trainer.limit_train_batches)
        return cls(store, collator, batching, *place, *limits, weights)

    def settings(self) -> dict[str, Any]:
        """What a resumed run must agree on."""
        return {
            ACCUMULATE: self.accumulate,
            "trainer.limit_train_batches": self.limit,
            **self.batching.plan(self.world_size),
        }

    def under(self, settings: StageSettings) -> Passes:
        """The same with the micro-batches of a stage.

        Args:
            settings: that the stage has to itself.
        """
        if settings.batch_size is None:
            return self
        return replace(self, batching=replace(self.batching, batch_size=settings.batch_size))

    def loader(self, ids: Sequence[int]) -> StageLoader:
        """Each of the pairs once, in this order."""
        return self._loader(ids, 1, None)

    def longest_first(self, ids: Sequence[int]) -> StageLoader:
        """Each of the pairs once, like lengths together; what doesn't fit the memory shows at once."""
        order = np.argsort(-self._tokens(ids), kind="stable")
        return self.loader([ids[i] for i in order.tolist()])

    def training(self, chunk: Chunk | Stage, epoch: int) -> StageLoader:
        """A pass of training over a chunk.

        Args:
            chunk: names the pass and has its pairs.
            epoch: within the stage.
        """
        return self._loader(self._epoch_ids(chunk, epoch), self.accumulate, self.limit, self.weights)

    def epoch_steps(self, chunk: Chunk, epochs: int) -> list[int]:
        """Optimizer steps of each pass: with `batch_tokens` they depend on the order of the pairs.

        Args:
            chunk: what is trained on.
            epochs: passes over it.
        """
        if self.batching.batch_tokens is None or not self.batching.shuffle:
            return [self._loader(chunk.pair_ids, self.accumulate, self.limit).num_steps] * epochs
        return [self.training(chunk, epoch).num_steps for epoch in range(epochs)]

    def end(self, stage: Stage, epoch: int, batches: int, reason: str) -> StageEnd:
        """Where a stage ends that goes no further.

        Args:
            stage: under way.
            epoch: within the stage.
            batches: micro-batches a rank of that pass that were taken.
            reason: in words.
        """
        taken = [run for before in range(epoch) for run in self.training(stage, before).run_ids()]
        taken += self.training(stage, epoch).run_ids()[: batches * self.world_size]
        steps = (*stage.epoch_steps[:epoch], -(-batches // self.accumulate))
        return StageEnd(steps, sum(len(run) for run in taken), reason)

    def fewest_batches(self, ids: Sequence[int], size: int) -> int:
        """Micro-batches a rank that no `size` of the pairs go below, in whatever order.

        Args:
            ids: of pairs.
            size: how many of them.
        """
        runs = -(-size // self.batching.batch_size)
        if self.batching.batch_tokens is not None:
            shortest = np.sort(self._tokens(ids))[:size]
            runs = fewest_runs(shortest, row_limit(self.collator, self.batching.batch_tokens))
        return steps_per_epoch(runs, self.world_size, 1, self.limit)[0]

    def check_layout(self, before: str | None) -> None:
        """Refuse to count tokens by another layout than the checkpoint's run.

        Args:
            before: class name of that run's collator; None without a checkpoint.

        Raises:
            ResumeError: the layouts differ, and with them the pairs of a step.
        """
        layout = type(self.collator).__name__
        if self.batching.batch_tokens is not None and before not in (None, layout):
            raise ResumeError(
                f"the checkpoint's run counted `data.batch_tokens` by {before}, this one by {layout}, with other pairs "
                "in a step; set `data.layout` to what that run's log says"
            )

    def log_long_pairs(self, ids: Sequence[int]) -> None:
        """Say how many pairs don't fit `batch_tokens`."""
        if self.batching.batch_tokens is None:
            return
        limit = row_limit(self.collator, self.batching.batch_tokens)
        beyond = int((self._tokens(ids) > limit).sum())
        if beyond:
            log.info("%d of %d pairs are beyond `data.batch_tokens`: a micro-batch each", beyond, len(ids))

    def _tokens(self, ids: Sequence[int]) -> np.ndarray:
        return self.collator.pair_tokens(self.store.lengths(ids))

    def _epoch_ids(self, chunk: Chunk | Stage, epoch: int) -> Sequence[int]:
        settings = self.batching
        if not settings.shuffle:
            return chunk.pair_ids
        if settings.pacing is not None and epoch == 0:
            return paced_order(chunk.pair_ids, settings.pacing, settings.seed, chunk.name)
        if not settings.bucket_window:
            return epoch_order(chunk.pair_ids, settings.seed, chunk.name, epoch)
        at_once, window = settings.batch_size * self.world_size, self.accumulate * settings.bucket_window
        return bucketed_order(self.store, chunk.pair_ids, at_once, window, settings.seed, chunk.name, epoch)

    def _loader(
        self, ids: Sequence[int], accumulate: int, limit: float | None, weights: Mapping[int, float] | None = None
    ) -> StageLoader:
        return StageLoader(
            self.store,
            self.collator,
            ids,
            self.batching.batch_size,
            rank=self.rank,
            world_size=self.world_size,
            accumulate=accumulate,
            max_batches=limit,
            batch_tokens=self.batching.batch_tokens,
            weights=weights,
        )


def plan_stages(chunks: Sequence[Chunk], staging: Staging, passes: Passes) -> list[Stage]:
    """The stages of a run.

    Args:
        chunks: in training order.
        staging: knows the settings of each, and the passes over it.
        passes: knows the optimizer steps of each pass.
    """
    names = [chunk.name for chunk in chunks]
    settings = staging.settings(names)
    each = zip(chunks, staging.epochs(names), settings, strict=True)
    return stage_plan(chunks, [passes.under(own).epoch_steps(chunk, epochs) for chunk, epochs, own in each], settings)
