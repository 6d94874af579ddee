"""Rank 1: what a packed row and a table of completion tokens are built from."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from sdpo_lightning.data.messages import Spans


class CompletionTensors(TypedDict):
    """The fields of `PreferenceBatch` that say what is scored."""

    source_index: Tensor
    target_ids: Tensor
    sequence_index: Tensor
    completion_lengths: Tensor


class Completions:
    """Which position predicts which token of which sequence."""

    def __init__(self, sequences: int) -> None:
        self._sources: list[int] = []
        self._targets: list[int] = []
        self._sequences: list[int] = []
        self._lengths = [0] * sequences

    def add(self, sequence: int, predictor: int, first: int, completion: list[int], unscored: Spans = ()) -> None:
        """What counts of a completion that stands at `first`, its first token predicted from `predictor`."""
        sources, targets = [predictor, *range(first, first + len(completion) - 1)], completion
        if unscored:
            left_out = {place for begin, end in unscored for place in range(begin, end)}
            kept = [place for place in range(len(completion)) if place not in left_out]
            sources, targets = [sources[place] for place in kept], [completion[place] for place in kept]
        self._sources += sources
        self._targets += targets
        self._sequences += [sequence] * len(targets)
        self._lengths[sequence] = len(targets)

    def tensors(self) -> CompletionTensors:
        """Fields of `PreferenceBatch`."""
        return {
            "source_index": torch.tensor(self._sources),
            "target_ids": torch.tensor(self._targets),
            "sequence_index": torch.tensor(self._sequences),
            "completion_lengths": torch.tensor(self._lengths),
        }


class PackedRow:
    """A packed row in the making."""

    def __init__(self, pairs: int) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.segments: list[tuple[int, int, int, int]] = []
        self.completions = Completions(2 * pairs)

    def add(self, sequence: int, prompt: list[int], completion: list[int], unscored: Spans = ()) -> int:
        """Prompt and completion as a segment of their own; returns where it starts."""
        start = len(self.ids)
        self.ids += prompt + completion
        self.positions += range(len(prompt) + len(completion))
        self.segments.append((start, len(self.ids), start, start))
        first = start + len(prompt)
        self.completions.add(sequence, first - 1, first, completion, unscored)
        return start

    def add_behind(
        self, sequence: int, prompt_start: int, prompt_length: int, completion: list[int], unscored: Spans = ()
    ) -> None:
        """A completion behind a prompt that stands earlier in the row."""
        start = len(self.ids)
        self.ids += completion
        self.positions += range(prompt_length, prompt_length + len(completion))
        prompt_end = prompt_start + prompt_length
        self.segments.append((start, len(self.ids), prompt_start, prompt_end))
        self.completions.add(sequence, prompt_end - 1, start, completion, unscored)

    def fill(self, length: int, pad_token_id: int) -> None:
        """Round the row up by a segment of its own, which no completion sees."""
        start = len(self.ids)
        if start < length:
            self.ids += [pad_token_id] * (length - start)
            self.positions += range(length - start)
            self.segments.append((start, length, start, start))
