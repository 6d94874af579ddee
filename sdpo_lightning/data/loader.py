"""Rank 3: resumable, rank-aware micro-batches of one pass over some pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, concatenate_datasets

from sdpo_lightning.data.batching import bucket_order, cut_by_pairs, cut_by_tokens, longer_side
from sdpo_lightning.data.collate import PreferenceCollator, TokenizedPair
from sdpo_lightning.data.curriculum import steps_per_epoch
from sdpo_lightning.data.messages import Spans
from sdpo_lightning.data.pacing import Pacing, paced_places
from sdpo_lightning.data.pair_ranks import PairNumbers
from sdpo_lightning.data.rated import NUMBERS
from sdpo_lightning.types import ConfigurationError, PreferenceBatch

_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_SPANS = ("chosen_unscored", "rejected_unscored")


class PairStore:
    """The tokenised pairs of all sources, found by pair id.

    Args:
        datasets: with `pair_id` and the ids of prompt, chosen and rejected; perhaps with what isn't scored of them, as
            begin, end, begin, end, ...
    """

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self._parts: list[Dataset] = []
        self.add(datasets)

    def add(self, datasets: Sequence[Dataset]) -> None:
        """Take in more pairs."""
        self._parts += datasets
        self._rows = concatenate_datasets(self._parts)
        ids = np.asarray(self._rows.with_format("numpy")["pair_id"][:])
        self._order = np.argsort(ids, kind="stable")
        self._sorted_ids = ids[self._order]
        columns = self._rows.with_format("arrow")

        def lengths_of(name: str) -> np.ndarray:
            return pc.list_value_length(columns[name][:]).to_numpy().astype(np.int64)

        self._lengths = np.stack([lengths_of(name) for name in _IDS])
        # Most sources have no words of others within their completions.
        has_spans = all(name in self._rows.column_names for name in _SPANS)
        self._has_spans = has_spans and any(lengths_of(name).any() for name in _SPANS)

    def _row_numbers(self, pair_ids: Sequence[int]) -> np.ndarray:
        ids = np.asarray(pair_ids, dtype=np.int64)
        found = np.searchsorted(self._sorted_ids, ids).clip(max=len(self._sorted_ids) - 1)
        if not (self._sorted_ids[found] == ids).all():
            raise ConfigurationError(
                "pairs are asked for that don't exist yet: those of `data.pair_sources` are made just before their "
                "stage; a reference that scores the pairs of all stages beforehand, or a fork behind such a stage, "
                "can't have them"
            )
        return self._order[found]

    def holds(self, pair_id: int) -> bool:
        """Whether there is such a pair."""
        return pair_id in self._sorted_ids

    def lengths(self, pair_ids: Sequence[int]) -> np.ndarray:
        """`[3, P]` int64: tokens of prompt, chosen and rejected completion of the given pairs."""
        return self._lengths[:, self._row_numbers(pair_ids)]

    def numbers(self, pair_ids: Sequence[int]) -> PairNumbers:
        """What the rows of the given pairs say of them; read from the disk at each call."""
        rows, names = self._row_numbers(pair_ids), self._rows.column_names
        table = self._rows.with_format("arrow")
        nothing = np.full(len(rows), np.nan)
        pair, prompt = (table[name][:].to_numpy()[rows] if name in names else nothing for name in NUMBERS)
        keys = table["prompt_key"][:].to_numpy()[rows] if "prompt_key" in names else rows
        return PairNumbers(pair.astype(np.float64), prompt.astype(np.float64), keys)

    def get(self, pair_ids: Sequence[int]) -> list[TokenizedPair]:
        """The pairs of the given ids, in that order."""
        rows = self._rows[self._row_numbers(pair_ids).tolist()]
        ids = zip(*(rows[name] for name in _IDS), strict=True)
        if not self._has_spans:
            return [TokenizedPair(*three) for three in ids]
        spans = zip(*(map(_pairs_of, rows[name]) for name in _SPANS), strict=True)
        return [
            TokenizedPair(prompt, chosen, rejected, (), *unscored)
            for (prompt, chosen, rejected), unscored in zip(ids, spans, strict=True)
        ]

    def digest(self, pair_ids: Sequence[int]) -> str:
        """sha256 over the tokenised rows in order."""
        digest = hashlib.sha256()
        for start in range(0, len(pair_ids), 1024):
            part = pair_ids[start : start + 1024]
            for pair_id, pair in zip(part, self.get(part), strict=True):
                digest.update(f"{pair_id}:{pair.text()}".encode())
        return digest.hexdigest()


def _pairs_of(bounds: list[int]) -> Spans:
    return tuple(zip(bounds[::2], bounds[1::2], strict=True))


def epoch_order(pair_ids: Sequence[int], seed: int, stage_name: str, epoch: int) -> list[int]:
    """Shuffled ids, a pure function of (seed, stage name, epoch within the stage).

    A stage run alone sees the same order, and so does a resumed one.
    """
    generator = _generator(f"{seed}:{stage_name}:{epoch}")
    return [pair_ids[i] for i in torch.randperm(len(pair_ids), generator=generator).tolist()]


def paced_order(pair_ids: Sequence[int], pacing: Pacing, seed: int, stage_name: str) -> list[int]:
    """The first pass of a stage with a pool that grows, a pure function of its arguments.

    Args:
        pair_ids: of the stage, the easiest first.
        pacing: how the pool grows.
        seed: of the draws.
        stage_name: as for `epoch_order`.
    """
    generator = _generator(f"{seed}:{stage_name}:0:paced")
    return [pair_ids[place] for place in paced_places(len(pair_ids), pacing, generator)]


def bucketed_order(
    store: PairStore,
    pair_ids: Sequence[int],
    run_pairs: int,
    window_runs: int,
    seed: int,
    stage_name: str,
    epoch: int,
) -> list[int]:
    """`epoch_order`, and within windows of it pairs of like length side by side; as pure a function.

    Args:
        store: knows the lengths.
        pair_ids: of the stage.
        run_pairs: pairs that all ranks take at a time.
        window_runs: runs of a window.
        seed: of both shuffles.
        stage_name: as for `epoch_order`.
        epoch: within the stage.
    """
    ids = epoch_order(pair_ids, seed, stage_name, epoch)
    generator = _generator(f"{seed}:{stage_name}:{epoch}:buckets")
    order = bucket_order(longer_side(store.lengths(ids)), run_pairs, window_runs, generator)
    return [ids[i] for i in order.tolist()]


def _generator(text: str) -> torch.Generator:
    mixed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(mixed)


def row_limit(collator: PreferenceCollator, batch_tokens: int) -> int:
    """Most tokens of a micro-batch whose rows, rounded up, stay within `batch_tokens`."""
    return batch_tokens // collator.pad_to_multiple_of * collator.pad_to_multiple_of


class StageLoader:
    """Micro-batches of one pass, this rank's share. Not a `DataLoader`: it resumes at any batch.

    The pass is cut into runs of `batch_size` pairs, or of as many as fit `batch_tokens`. An optimizer step takes
    the next `accumulate * world_size` runs; its micro-batch k on rank r is the (k * world_size + r)-th of them.
    The last step may be smaller; a rank without a run gets a filler of weight 0, so that all ranks run the same
    number of micro-batches.

    Args:
        store: where the ids of a pair are found.
        collator: makes the batches.
        pair_ids: in the order of this pass.
        batch_size: pairs a rank and micro-batch; ignored where `batch_tokens` is given.
        rank: of this process.
        world_size: processes.
        accumulate: micro-batches an optimizer step.
        max_batches: micro-batches after which the Trainer stops (`limit_train_batches`: an int is a number, a float
            a share); None is all.
        batch_tokens: most tokens that the model runs on in a micro-batch; a pair beyond it stands alone.
        weights: place of a source -> weight of its pairs, 1 where it isn't given.

    Attributes:
        num_steps: optimizer steps of the pass.
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
        max_batches: float | None = None,
        batch_tokens: int | None = None,
        weights: Mapping[int, float] | None = None,
    ) -> None:
        self._store = store
        self._collator = collator
        self._pair_ids = pair_ids
        self._rank = rank
        self._world_size = world_size
        self._accumulate = accumulate
        self._weights = {index: weight for index, weight in (weights or {}).items() if weight != 1}
        if batch_tokens is None:
            self._bounds = cut_by_pairs(len(pair_ids), batch_size).tolist()
        else:
            tokens = collator.pair_tokens(store.lengths(pair_ids))
            self._bounds = cut_by_tokens(tokens, row_limit(collator, batch_tokens), collator.pads).tolist()
        used, self.num_steps = self._count(accumulate, 1.0 if max_batches is None else max_batches)
        self._runs_used = min(used * world_size, len(self._bounds) - 1)
        self._position = 0
        self._resume_at = 0

    def _count(self, accumulate: int, limit: float) -> tuple[int, int]:
        return steps_per_epoch(len(self._bounds) - 1, self._world_size, accumulate, limit)

    def __len__(self) -> int:
        return self._count(1, 1.0)[0]

    def run_ids(self) -> list[Sequence[int]]:
        """Pair ids of each run of the pass, those of all ranks."""
        ends = self._bounds[: self._runs_used + 1]
        return [self._pair_ids[start:end] for start, end in zip(ends, ends[1:], strict=False)]

    def __iter__(self) -> Iterator[PreferenceBatch]:
        # Lazy: Lightning calls iter() several times before it takes a batch, and takes no more than it counts.
        start, self._resume_at = self._resume_at, 0
        for position in range(start, len(self)):
            self._position = position + 1
            yield self._batch(position)

    def _batch(self, position: int) -> PreferenceBatch:
        run = position * self._world_size + self._rank
        if run < len(self._bounds) - 1:
            ids, real = list(self._pair_ids[self._bounds[run] : self._bounds[run + 1]]), 1.0
        else:
            ids, real = [self._pair_ids[-1]], 0.0
        window = self._accumulate * self._world_size
        begin = position // self._accumulate * window
        # Beyond `max_batches` none is used.
        end = max(begin, min(begin + window, self._runs_used))
        first, last = self._bounds[begin], self._bounds[end]
        weights = [real * weight for weight in self._shares(ids, self._pair_ids[first:last])]
        return self._collator(ids, self._store.get(ids), weights, max(1, last - first))

    def _shares(self, ids: Sequence[int], step_ids: Sequence[int]) -> list[float]:
        """Weights of some pairs of a step; over the whole step their mean is 1."""
        if not self._weights or not step_ids:
            return [1.0] * len(ids)
        mean = sum(self._weights.get(i >> 40, 1.0) for i in step_ids) / len(step_ids)
        return [self._weights.get(i >> 40, 1.0) / mean for i in ids]

    def state_dict(self) -> dict[str, int]:
        """Micro-batches taken so far; the same on every rank."""
        return {"position": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on after that many micro-batches."""
        self._position = self._resume_at = state["position"]
