"""Rank 1: counts over tokenised pairs: lengths, repeats, contradictions, shared prompts. Arrays only, no strings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class Finding:
    """One line about the configuration or the data.

    Attributes:
        level: an `error` stops the run, a `warning` is only said, an `info` is part of the report.
        text: what was found; of an error also what was expected and which setting to change.
    """

    level: Literal["error", "warning", "info"]
    text: str


@dataclass(frozen=True, eq=False)
class PairKeys:
    """Numbers that stand for pairs; two of a million differ with a chance of 1 - 3e-8.

    Attributes:
        prompt: `[P]` int64, of the prompt's text.
        pair: `[P]` uint64, of prompt, chosen and rejected.
        swapped: `[P]` uint64, of the same pair with its answers exchanged.
    """

    prompt: np.ndarray
    pair: np.ndarray
    swapped: np.ndarray

    def at(self, rows: np.ndarray) -> PairKeys:
        """Of some of the rows.

        Args:
            rows: `[Q]` int64.
        """
        return PairKeys(self.prompt[rows], self.pair[rows], self.swapped[rows])


def pair_keys(prompts: np.ndarray, chosen: pa.ChunkedArray, rejected: pa.ChunkedArray) -> PairKeys:
    """Keys of P tokenised pairs.

    Args:
        prompts: `[P]` int64, keys of the prompts.
        chosen: P lists of ids.
        rejected: P lists of ids.
    """
    prompt, first, second = prompts.astype(np.uint64), list_keys(chosen), list_keys(rejected)
    ordered = [_mixed(prompt + _mixed(left + _mixed(right))) for left, right in ((first, second), (second, first))]
    return PairKeys(prompts, *ordered)


def list_keys(lists: pa.ChunkedArray) -> np.ndarray:
    """`[P]` uint64: a number for each of P lists of integers, by values and places."""
    return np.concatenate([np.zeros(0, np.uint64), *(_chunk_keys(chunk) for chunk in lists.chunks)])


def _chunk_keys(lists: pa.ListArray) -> np.ndarray:
    offsets = lists.offsets.to_numpy().astype(np.int64)
    values = lists.values.to_numpy()[offsets[0] : offsets[-1]].astype(np.uint64)
    offsets, counts = offsets - offsets[0], np.diff(offsets)
    places = (np.arange(len(values)) - np.repeat(offsets[:-1], counts)).astype(np.uint64)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_mixed(values << np.uint64(32) | places))])
    # Unsigned sums wrap, and so do their differences.
    return _mixed(sums[offsets[1:]] - sums[offsets[:-1]] + counts.astype(np.uint64))


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), a bijection of uint64."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def repeats(keys: PairKeys) -> int:
    """Pairs that stand in a source already."""
    return len(keys.pair) - len(np.unique(keys.pair))


def contradictions(keys: PairKeys) -> int:
    """Distinct pairs of a source that stand there the other way round too, both counted as one."""
    return int(np.isin(np.unique(keys.pair), keys.swapped).sum()) // 2


def shared_pairs(left: PairKeys, right: PairKeys) -> int:
    """Distinct pairs that stand in both."""
    return len(np.intersect1d(left.pair, right.pair))


def opposed_pairs(left: PairKeys, right: PairKeys) -> int:
    """Distinct pairs of the one that stand in the other the other way round."""
    return len(np.intersect1d(left.pair, right.swapped))


def shared_prompts(left: Iterable[PairKeys], right: Iterable[PairKeys]) -> int:
    """Distinct prompts that stand in both groups."""
    ours, theirs = (np.concatenate([np.zeros(0, np.int64), *(keys.prompt for keys in side)]) for side in (left, right))
    return len(np.intersect1d(ours, theirs))


def length_line(lengths: np.ndarray) -> str:
    """Median, 95th percentile and maximum of the tokens of prompt, chosen and rejected.

    Args:
        lengths: `[3, P]` int64 of P > 0 pairs.
    """
    at = np.percentile(lengths, (50, 95, 100), axis=1, method="higher").astype(int).T.tolist()
    names = ("prompt", "chosen", "rejected")
    return ", ".join(f"{name} {'/'.join(map(str, row))}" for name, row in zip(names, at, strict=True))
