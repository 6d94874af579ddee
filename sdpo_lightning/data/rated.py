"""Rank 0: several answers to one prompt and what they are worth -> pairs of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

PairRule = Literal["best_worst", "best_others", "all"]
# Columns that say what the answers are worth.
VERDICTS = ("scores", "ranks", "preference", "best")
# All that `columns` may name.
_PLAIN = ("prompt", "chosen", "rejected", "system", "tools", "chat_template_kwargs", "answers", *VERDICTS)
# What a pair and its prompt are worth to a curriculum.
NUMBERS = ("pair_score", "prompt_score")
CANONICAL = (*_PLAIN, *NUMBERS)
# So many answers have 120 pairs, whose numbers fit the seven bits that a pair id has for them.
MOST_ANSWERS = 16


def columns_of(spec: str) -> list[str]:
    """Columns that a setting names: `answers`, `completions.response` (a key within a list) or `answer_a, answer_b`."""
    return [part.strip().partition(".")[0] for part in spec.split(",")]


def values_of(record: dict[str, Any], spec: str) -> list[Any] | None:
    """What stands in those columns, one value an answer; None where there is no list.

    Args:
        record: one row.
        spec: as for `columns_of`.
    """
    if "," in spec:
        return [record.get(column) for column in columns_of(spec)]
    column, _, key = spec.partition(".")
    items = record.get(column)
    if key and isinstance(items, dict):  # how `datasets` gives a list of structs
        items = items.get(key)
    elif key and isinstance(items, list):
        items = [item.get(key) if isinstance(item, dict) else None for item in items]
    return items if isinstance(items, list) else None


def scores_of(verdict: str, values: Any, count: int) -> list[float | None] | None:
    """What each answer is worth, higher = better; None for one that isn't rated.

    Args:
        verdict: one of `VERDICTS`.
        values: a list of scores, or of ranks (1 is the best); for `preference` of two answers one number, negative
            where the first is better; for `best` the place of the best answer, from 0.
        count: of answers.

    Returns:
        `count` scores, or None where the values don't fit the answers.
    """
    if verdict in ("scores", "ranks"):
        if not isinstance(values, list) or len(values) != count:
            return None
        numbers = [number_of(value) for value in values]
        return numbers if verdict == "scores" else [None if n is None else -n for n in numbers]
    number = number_of(values)
    if verdict == "preference":
        return None if number is None or count != 2 else [-number, number]
    if number is None or number not in range(count):
        return None
    return [float(place == number) for place in range(count)]


def number_of(value: Any) -> float | None:
    """A finite number, perhaps as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def choose_pairs(scores: Sequence[float | None], rule: PairRule, min_gap: float) -> Iterator[tuple[int, int]]:
    """Places of the better and the worse answer of each pair.

    Args:
        scores: of the answers; None leaves one out.
        rule: `best_worst`: one pair, of ties the first; `best_others`: the best with each other one (Curri-DPO,
            arXiv 2403.07230), of ties the first; `all`: each two.
        min_gap: least difference of their scores; equal scores never make a pair.
    """
    rated = [place for place, score in enumerate(scores) if score is not None]
    value = {place: float(scores[place] or 0.0) for place in rated}
    best = max(rated, key=value.__getitem__, default=0)
    if rule == "best_worst":
        candidates = [(best, min(rated, key=value.__getitem__))] if rated else []
    elif rule == "best_others":
        candidates = [(best, other) for other in rated]
    else:
        candidates = [(a, b) for a in rated for b in rated]
    for better, worse in candidates:
        gap = value[better] - value[worse]
        if gap > 0 and gap >= min_gap:
            yield better, worse


def pair_number(one: int, other: int) -> int:
    """A number of two places that depends on nothing else, from 0 to 119 for `MOST_ANSWERS`."""
    low, high = sorted((one, other))
    return high * (high - 1) // 2 + low
