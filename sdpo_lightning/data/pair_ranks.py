"""Rank 1: numbers that stand in the rows -> scores that order the pairs, the easiest first. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sdpo_lightning.types import ConfigurationError

EasyEnd = Literal["high", "low"]
PromptRule = Literal["low_score_first", "high_score_first", "large_mean_gap_first"]


@dataclass(frozen=True, eq=False)
class PairNumbers:
    """What the rows of P pairs say of them.

    Attributes:
        pair_score: `[P]` float64, the number of `columns: {pair_score: ...}` or the gap of the ratings; NaN: none.
        prompt_score: `[P]` float64, that of `columns: {prompt_score: ...}`; NaN: none.
        prompt_key: `[P]` int64, equal where the prompt is.
    """

    pair_score: np.ndarray
    prompt_score: np.ndarray
    prompt_key: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[PairNumbers]) -> PairNumbers:
        """Those of several sources, one after another."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))


def check_numbers_of(numbers: Mapping[str, PairNumbers], name: Literal["pair_score", "prompt_score"]) -> None:
    """Refuse sources whose rows don't hold a number.

    Args:
        numbers: source name -> those of its pairs.
        name: which number.

    Raises:
        ConfigurationError: naming the source and the setting.
    """
    for source, own in numbers.items():
        if missing := int(np.isnan(getattr(own, name)).sum()):
            rated = ", or take rated answers" if name == "pair_score" else ""
            raise ConfigurationError(
                f"source {source!r}: {missing} of {len(own.prompt_key)} pairs have no `{name}`, expected a number for "
                f"each, to cut them by it; name the column by `data.sources[{source}].columns: {{{name}: ...}}`{rated}"
            )


def check_count(owner: object, field: str) -> None:
    """Refuse a number below 1.

    Args:
        owner: whose setting it is.
        field: its name.

    Raises:
        ConfigurationError: naming both.
    """
    if (value := getattr(owner, field)) < 1:
        raise ConfigurationError(f"`{field}` of {type(owner).__name__} is {value}, expected at least 1")


def check_word(owner: object, field: str, words: Sequence[str]) -> None:
    """Refuse a word that isn't known.

    Args:
        owner: whose setting it is.
        field: its name.
        words: those that are.

    Raises:
        ConfigurationError: naming both.
    """
    if (value := getattr(owner, field)) not in words:
        raise ConfigurationError(f"`{field}` of {type(owner).__name__} is {value!r}, expected one of {list(words)}")


def split_scores(scores: np.ndarray, numbers: Mapping[str, PairNumbers]) -> dict[str, Tensor]:
    """Scores of all pairs together, source by source.

    Args:
        scores: `[P]`, of all sources one after another.
        numbers: source name -> those of its pairs.
    """
    ends = np.cumsum([len(own.prompt_key) for own in numbers.values()])
    return dict(zip(numbers, map(torch.from_numpy, np.split(scores, ends[:-1])), strict=True))


def dense_share(keys: np.ndarray) -> np.ndarray:
    """Place of each value among the distinct ones, as a share: the same for equal values.

    Args:
        keys: `[P]`, the lowest one comes first.

    Returns:
        `[P]` float64 in [0, 1).
    """
    distinct, places = np.unique(keys, return_inverse=True)
    return places.reshape(-1) / max(1, len(distinct))


def bins(keys: np.ndarray, count: int) -> np.ndarray:
    """Quantiles by value: equal values share a bin, whatever order they stand in, so bins needn't be equally full.

    Args:
        keys: `[P]`, the lowest one comes first.
        count: of bins.

    Returns:
        `[P]` int64 in 0..count-1: count * (share of the values that are lower), rounded down.
    """
    lower = np.searchsorted(np.sort(keys), keys, side="left")
    return lower * count // max(1, len(keys))


def column_scores(numbers: PairNumbers, easy: EasyEnd) -> np.ndarray:
    """The pairs' own number as a score.

    Args:
        numbers: of P pairs.
        easy: whether high or low numbers are the easy ones.

    Returns:
        `[P]` float64, higher = easier.
    """
    return numbers.pair_score if easy == "high" else -numbers.pair_score


def place_in_prompt(numbers: PairNumbers, easy: EasyEnd, stages: int) -> np.ndarray:
    """The stage of each pair by its place among the pairs of its prompt (Curri-DPO, arXiv 2403.07230).

    Pair p of the m pairs of a prompt, counted from 0 with the easiest first, comes in stage floor(p * stages / m).
    With as many pairs as stages each stage has one pair of the prompt; a prompt's only pair comes in the first.

    Args:
        numbers: of P pairs.
        easy: whether high or low numbers are the easy ones; ties keep their order.
        stages: T.

    Returns:
        `[P]` int64 in 0..T-1.
    """
    order = np.lexsort((-column_scores(numbers, easy), numbers.prompt_key))
    _, starts, sizes = np.unique(numbers.prompt_key[order], return_index=True, return_counts=True)
    places = np.arange(len(order)) - np.repeat(starts, sizes)
    found = np.empty(len(order), dtype=np.int64)
    found[order] = places * stages // np.repeat(sizes, sizes)
    return found


def prompt_keys(numbers: PairNumbers, rule: PromptRule) -> np.ndarray:
    """A number for the prompt of each pair, lower = easier.

    Args:
        numbers: of P pairs.
        rule: `low_score_first` or `high_score_first` of the rows' `prompt_score`; `large_mean_gap_first`: of the mean
            `pair_score` of the prompt's pairs.

    Returns:
        `[P]` float64.
    """
    if rule != "large_mean_gap_first":
        return numbers.prompt_score if rule == "low_score_first" else -numbers.prompt_score
    _, places, counts = np.unique(numbers.prompt_key, return_inverse=True, return_counts=True)
    places = places.reshape(-1)
    return -(np.bincount(places, weights=numbers.pair_score) / counts)[places]


def grid_scores(numbers: PairNumbers, rule: PromptRule, prompt_bins: int, gap_bins: int) -> np.ndarray:
    """Cells of a grid, prompt rank x gap rank, walked by the sum of the two ranks; of a like sum the easier gap first.

    Args:
        numbers: of P pairs.
        rule: which prompts are the easy ones.
        prompt_bins: ranks of prompts; each prompt counts once, however many pairs it has.
        gap_bins: ranks of gaps; the largest is the easiest.

    Returns:
        `[P]` float64, higher = easier: -(number of the cell), less a share below 1 by the gap within it.
    """
    keys = prompt_keys(numbers, rule)
    _, prompts = np.unique(numbers.prompt_key, return_inverse=True)
    order = np.lexsort((keys, prompts.reshape(-1)))
    by_prompt = prompts.reshape(-1)[order], keys[order]
    # A prompt may stand with two scores, in two sources; then it counts with each.
    is_new = np.any([np.diff(column, prepend=np.nan) != 0 for column in by_prompt], axis=0)
    prompt_rank = np.empty(len(order), dtype=np.int64)
    prompt_rank[order] = bins(by_prompt[1][is_new], prompt_bins)[np.cumsum(is_new) - 1]
    gap_rank = bins(-numbers.pair_score, gap_bins)
    cells = (prompt_rank + gap_rank) * gap_bins + gap_rank
    return -(cells + dense_share(-numbers.pair_score))
