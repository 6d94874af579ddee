"""Rank 3: resumable, rank-aware micro-batches of one pass over some pairs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets

from sdpo_lightning.data.collate import PreferenceCollator, TokenizedPair
from sdpo_lightning.types import PreferenceBatch

_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


class PairStore:
    """The tokenised pairs of all sources, found by pair id.

    Args:
        datasets: with `pair_id` and the ids of prompt, chosen and rejected.
    """

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self._rows = concatenate_datasets(list(datasets))
        ids = np.asarray(self._rows.with_format("numpy")["pair_id"][:])
        self._order = np.argsort(ids, kind="stable")
        self._sorted_ids = ids[self._order]

    def get(self, pair_ids: Sequence[int]) -> list[TokenizedPair]:
        """The pairs of the given ids, in that order."""
        found = np.searchsorted(self._sorted_ids, np.asarray(pair_ids))
        assert (self._sorted_ids[found] == np.asarray(pair_ids)).all(), "unknown pair id"
        rows = self._rows[self._order[found].tolist()]
        return [TokenizedPair(*ids) for ids in zip(*(rows[name] for name in _IDS), strict=True)]

    def digest(self, pair_ids: Sequence[int]) -> str:
        """sha256 over the tokenised rows in order."""
        digest = hashlib.sha256()
        for start in range(0, len(pair_ids), 1024):
            part = pair_ids[start : start + 1024]
            for pair_id, pair in zip(part, self.get(part), strict=True):
                digest.update(f"{pair_id}:{pair.prompt_ids}{pair.chosen_ids}{pair.rejected_ids}".encode())
        return digest.hexdigest()


def epoch_order(pair_ids: Sequence[int], seed: int, stage_name: str, epoch: int) -> list[int]:
    """Shuffled ids, a pure function of (seed, stage name, epoch within the stage).

    A stage run alone sees the same order, and so does a resumed one.
    """
    text = f"{seed}:{stage_name}:{epoch}".encode()
    mixed = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(mixed)
    return [pair_ids[i] for i in torch.randperm(len(pair_ids), generator=generator).tolist()]


class StageLoader:
    """Micro-batches of one pass, this rank's share. Not a `DataLoader`: it resumes at any batch.

    An optimizer step takes the next `accumulate * world_size * batch_size` pairs; its micro-batch k on rank r
    is the (k * world_size + r)-th run of `batch_size` of them. The last step may be smaller; a rank without
    a pair gets a filler of weight 0, so that all ranks run the same number of micro-batches.

    Args:
        store: where the ids of a pair are found.
        collator: makes the batches.
        pair_ids: in the order of this pass.
        batch_size: pairs a rank and micro-batch.
        rank: of this process.
        world_size: processes.
        accumulate: micro-batches an optimizer step.
        max_batches: micro-batches after which the Trainer stops (`limit_train_batches`).
    """

    def __init__(
        self,
        store: PairStore,
        collator: PreferenceCollator,
        pair_ids: Sequence[int],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        max_batches: int | None = None,
    ) -> None:
        self._store = store
        self._collator = collator
        self._pair_ids = pair_ids
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        self._accumulate = accumulate
        used = len(self) if max_batches is None else min(len(self), max_batches)
        self._pairs_used = min(len(pair_ids), used * world_size * batch_size)
        self._position = 0
        self._resume_at = 0

    def __len__(self) -> int:
        return math.ceil(len(self._pair_ids) / (self._batch_size * self._world_size))

    def __iter__(self) -> Iterator[PreferenceBatch]:
        # Lazy: Lightning calls iter() several times before it takes a batch, and takes no more than it counts.
        start, self._resume_at = self._resume_at, 0
        for position in range(start, len(self)):
            self._position = position + 1
            yield self._batch(position)

    def _batch(self, position: int) -> PreferenceBatch:
        start = (position * self._world_size + self._rank) * self._batch_size
        ids = list(self._pair_ids[start : start + self._batch_size])
        weights = [1.0] * len(ids)
        if not ids:
            ids, weights = [self._pair_ids[0]], [0.0]
        window = self._accumulate * self._world_size * self._batch_size
        begin = position // self._accumulate * window
        step_pairs = max(1, min(begin + window, self._pairs_used) - begin)
        return self._collator(ids, self._store.get(ids), weights, step_pairs)

    def state_dict(self) -> dict[str, int]:
        """Micro-batches taken so far; the same on every rank."""
        return {"position": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on after that many micro-batches."""
        self._position = self._resume_at = state["position"]
