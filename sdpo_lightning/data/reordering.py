"""Rank 2: chunks that are decided, their pairs or those after them put in another order. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sdpo_lightning.data.curriculum import reward_accuracy
from sdpo_lightning.types import Chunk, ConfigurationError


def score_by_id(ids: Mapping[str, Sequence[int]], scores: Mapping[str, Tensor]) -> dict[int, float]:
    """Pair id -> score.

    Args:
        ids: source name -> ids of its pairs.
        scores: source name -> `[P]` scores of the first P of them; NaN is left out.
    """
    found: dict[int, float] = {}
    for name, own in scores.items():
        found |= {i: score for i, score in zip(ids[name], own.tolist(), strict=False) if score == score}
    return found


def easiest_first(
    pair_ids: Sequence[int], scores: Mapping[int, float], why: str, hardest_first: bool = False
) -> list[int]:
    """Pairs by their score; ties keep their order.

    Args:
        pair_ids: perhaps with repeats.
        scores: pair id -> score, higher = easier.
        why: the setting that needs them, for the error.
        hardest_first: turn it round.

    Raises:
        ConfigurationError: a pair without a score.
    """
    if missing := sum(i not in scores for i in pair_ids):
        raise ConfigurationError(
            f"{missing} of {len(pair_ids)} pairs have no score, expected one each for {why}; leave `data.rank_sample` "
            "out, and take a `data.difficulty` that counts every pair"
        )
    sign = 1.0 if hardest_first else -1.0
    return sorted(pair_ids, key=lambda i: sign * scores[i])


def cut_again(chunks: Sequence[Chunk], decided: int, scores: Mapping[int, float], hardest_first: bool) -> list[Chunk]:
    """The pairs of all chunks that aren't decided, cut anew by their score into chunks of the same names and sizes.

    Args:
        chunks: in training order.
        decided: so many of them stay as they are.
        scores: pair id -> score, higher = easier.
        hardest_first: whether the hardest pairs come next.

    Raises:
        ConfigurationError: a pair without a score.
    """
    rest = [i for chunk in chunks[decided:] for i in chunk.pair_ids]
    ordered, start, made = easiest_first(rest, scores, "`data.ranked_by: previous`", hardest_first), 0, []
    for chunk in chunks[decided:]:
        made.append(Chunk(chunk.name, ordered[start : start + len(chunk.pair_ids)]))
        start += len(chunk.pair_ids)
    return [*chunks[:decided], *made]


def accuracies(chunks: Sequence[Chunk], scores: Mapping[int, float]) -> dict[str, float]:
    """Share of each chunk's distinct pairs with a score above 0, ties 1/2, of those that have one.

    Args:
        chunks: in any order.
        scores: pair id -> score.

    Raises:
        ConfigurationError: a chunk without a scored pair.
    """
    own = {chunk.name: [scores[i] for i in dict.fromkeys(chunk.pair_ids) if i in scores] for chunk in chunks}
    return {name: reward_accuracy(torch.tensor(values, dtype=torch.float64))[0] for name, values in own.items()}


def order_again(chunks: Sequence[Chunk], decided: int, scores: Mapping[int, float], hardest_first: bool) -> list[Chunk]:
    """The chunks that aren't decided, ordered anew by their accuracy; ties keep their order.

    Args:
        chunks: in training order.
        decided: so many of them stay where they are.
        scores: pair id -> score.
        hardest_first: whether the chunk of lowest accuracy comes next.

    Raises:
        ConfigurationError: a chunk without a scored pair.
    """
    found = accuracies(chunks[decided:], scores)
    sign = 1.0 if hardest_first else -1.0
    return [*chunks[:decided], *sorted(chunks[decided:], key=lambda chunk: sign * found[chunk.name])]
