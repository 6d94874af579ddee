"""Rank 0: which rows of a source are used: a filter by columns, and a seeded sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

# A value, a list of values, or bounds `{min: 4, max: 5}`.
Condition = str | int | float | bool | list[str | int | float | bool] | dict[str, float]
Sample = int | float

_BOUNDS = {"min", "max"}


def is_condition(value: Any) -> bool:
    """Whether it can be a condition of a filter."""
    if isinstance(value, dict):
        return bool(value) and set(value) <= _BOUNDS and all(map(_is_number, value.values()))
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(one, str | int | float | bool) for one in values)


def is_sample(value: Sample) -> bool:
    """Whether it is a number of pairs from 1 on, or a share above 0 and at most 1."""
    if isinstance(value, bool):
        return False
    return value >= 1 if isinstance(value, int) else 0 < value <= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def passes(record: Mapping[str, Any], filter: Mapping[str, Condition]) -> bool:
    """Whether a row fulfils every condition; a missing or null value fulfils none.

    Args:
        record: one row.
        filter: column -> condition; bounds count as within.
    """
    return all(_fulfils(record.get(column), condition) for column, condition in filter.items())


def _fulfils(value: Any, condition: Condition) -> bool:
    if isinstance(condition, dict):
        low, high = condition.get("min", -np.inf), condition.get("max", np.inf)
        return _is_number(value) and low <= value <= high
    # In Python True equals 1.
    values = condition if isinstance(condition, list) else [condition]
    return any(isinstance(value, bool) == isinstance(wanted, bool) and value == wanted for wanted in values)


def sampled(count: int, sample: Sample, seed: int) -> np.ndarray:
    """Ascending places of a sample, a pure function of its arguments.

    Args:
        count: of what is there.
        sample: how many, or their share (a float, rounded to the nearest).
        seed: of the choice.

    Returns:
        `[n]` int64; all places where more are asked for than there are.
    """
    wanted = sample if isinstance(sample, int) else max(1, round(sample * count))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return np.sort(order[:wanted].numpy())


def ranked_ids(train_ids: Sequence[int], sample: int | None, seed: int) -> Sequence[int]:
    """The pairs of a source that M_0 scores, in the order of the file.

    Args:
        train_ids: all of its training pairs.
        sample: how many are drawn; None is all.
        seed: of the draw.
    """
    if sample is None:
        return train_ids
    return [train_ids[place] for place in sampled(len(train_ids), sample, seed)]
