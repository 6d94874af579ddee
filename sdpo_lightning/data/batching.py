"""Rank 1: how the pairs of one pass are cut into micro-batches, and ordered so that like lengths meet. Pure functions.

A run is what one micro-batch of one rank takes: neighbours in the order of the pass.
"""

from __future__ import annotations

import numpy as np
import torch

from sdpo_lightning.types import ConfigurationError


def longer_side(lengths: np.ndarray) -> np.ndarray:
    """Tokens of a pair's prompt and its longer completion.

    Args:
        lengths: `[3, P]` int64, of prompt, chosen and rejected.

    Returns:
        `[P]` int64.
    """
    return lengths[0] + np.maximum(lengths[1], lengths[2])


def cut_by_pairs(num_pairs: int, batch_size: int) -> np.ndarray:
    """Runs of `batch_size` pairs, the last one perhaps shorter.

    Args:
        num_pairs: P.
        batch_size: pairs of a run.

    Returns:
        `[runs + 1]` int64: where each run begins, and P.
    """
    return np.append(np.arange(0, num_pairs, batch_size), num_pairs)


def cut_by_tokens(tokens: np.ndarray, limit: int, pads: bool) -> np.ndarray:
    """Runs as long as the limit allows; a pair beyond it is a run of its own.

    Args:
        tokens: `[P]` int64, what each pair costs.
        limit: most tokens of a run.
        pads: True where every pair of a run costs as much as the largest.

    Returns:
        `[runs + 1]` int64: where each run begins, and P.
    """
    bounds, start, total, largest = [0], 0, 0, 0
    for position, cost in enumerate(tokens.tolist()):
        largest = max(largest, cost)
        total = (position - start + 1) * largest if pads else total + cost
        if total > limit and position > start:
            start, total, largest = position, cost, cost
            bounds.append(position)
    if len(tokens):
        bounds.append(len(tokens))
    return np.array(bounds)


def fewest_runs(tokens: np.ndarray, limit: int) -> int:
    """The number of runs that no order of the pairs goes below.

    Args:
        tokens: `[P]` int64, what each pair costs.
        limit: most tokens of a run.
    """
    # A pair beyond the limit fills one run.
    return int(-(-np.minimum(tokens, limit).sum() // limit))


def bucket_order(lengths: np.ndarray, run_pairs: int, window_runs: int, generator: torch.Generator) -> np.ndarray:
    """Let like lengths meet: sort each window by length, cut it into runs, and shuffle the runs.

    Args:
        lengths: `[P]` int64, in the shuffled order of the pass.
        run_pairs: pairs of a run, over all ranks.
        window_runs: runs of a window; the last window may be smaller.
        generator: of the shuffle.

    Returns:
        `[P]` int64, a permutation of 0..P-1. A shorter run is the last one, of whatever length its pairs are.
    """
    parts = []
    for start in range(0, len(lengths), run_pairs * window_runs):
        window = lengths[start : start + run_pairs * window_runs]
        ascending = start + np.argsort(window, kind="stable")
        runs = torch.randperm(-(-len(window) // run_pairs), generator=generator).numpy()
        sizes = np.full(len(runs), run_pairs)
        # The run that the shuffle puts last takes what is left over.
        sizes[runs[-1]] -= len(runs) * run_pairs - len(window)
        cuts = np.split(ascending, np.cumsum(sizes)[:-1])
        parts += [cuts[run] for run in runs]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def check_batching(batch_tokens: int | None, bucket_window: int, pad_to_multiple_of: int, shuffle: bool) -> None:
    """Check the settings of `data` that say what a micro-batch holds.

    Raises:
        ConfigurationError: one outside its range, or two that have no meaning together.
    """
    if pad_to_multiple_of < 1:
        raise ConfigurationError(f"`data.pad_to_multiple_of` is {pad_to_multiple_of}, expected at least 1")
    if batch_tokens is not None and batch_tokens < pad_to_multiple_of:
        raise ConfigurationError(
            f"`data.batch_tokens` is {batch_tokens}, expected at least `data.pad_to_multiple_of`, which is "
            f"{pad_to_multiple_of}: no row is shorter"
        )
    if bucket_window < 0:
        raise ConfigurationError(f"`data.bucket_window` is {bucket_window}, expected at least 0")
    if bucket_window and batch_tokens is not None:
        raise ConfigurationError(
            f"`data.bucket_window` is {bucket_window} and `data.batch_tokens` is {batch_tokens}: the one evens out "
            "micro-batches of so many pairs, the other fills them by tokens; leave one out"
        )
    if bucket_window and not shuffle:
        raise ConfigurationError(
            f"`data.bucket_window` is {bucket_window}, which changes the order of the pairs, but `data.shuffle` is "
            "false; leave one out"
        )
