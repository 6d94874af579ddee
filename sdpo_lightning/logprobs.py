"""Rank 1: hidden states -> token logps -> pair logps, chunked over the LM head.

Logits of prompts and padding never exist: only the N completion positions go through the head, and at most
`logits_budget_mb` of them at a time; a chunk's logits are computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sdpo_lightning.types import PairLogps, PreferenceBatch


def token_logps(
    hidden: Tensor,
    batch: PreferenceBatch,
    head: Callable[[Tensor], Tensor],
    vocab_size: int,
    logits_budget_mb: float = 256.0,
) -> Tensor:
    """Log-probability of each completion token.

    Args:
        hidden: `[R, L, D]` last hidden states, after the final norm.
        batch: says which position predicts which token.
        head: maps `[n, D]` to logits `[n, V]`.
        vocab_size: V, rows of the head.
        logits_budget_mb: most MiB of fp32 logits that exist at once.

    Returns:
        `[N]` float32, nats.
    """
    selected = hidden.flatten(0, 1)[batch.source_index]
    rows = max(1, int(logits_budget_mb * 2**20 / (4 * vocab_size)))
    if len(selected) <= rows:
        return _logps_of(selected, batch.target_ids, head)
    chunks = zip(selected.split(rows), batch.target_ids.split(rows), strict=True)
    return torch.cat([checkpoint(_logps_of, h, t, head, use_reentrant=False) for h, t in chunks])


def _logps_of(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    # fp32 before the softmax: at logps of -1e4 a bf16 sum is off by tens of nats.
    return gather_logps(head(hidden), targets)


def gather_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target] in float32.

    Args:
        logits: `[N, V]`.
        targets: `[N]` int64.

    Returns:
        `[N]` float32, nats.
    """
    logits = logits.float()
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)


def pair_logps(logps: Tensor, batch: PreferenceBatch) -> PairLogps:
    """Sum the token logps of each completion (arXiv 2305.18290: log pi(y | x)).

    Args:
        logps: `[N]` float32, from `token_logps`.
        batch: says which token belongs to which of its 2B sequences.

    Returns:
        `PairLogps` of `[B]`, summed in float32.
    """
    totals = logps.new_zeros(2 * batch.num_pairs).index_add(0, batch.sequence_index, logps)
    chosen, rejected = totals.chunk(2)
    chosen_lengths, rejected_lengths = batch.completion_lengths.chunk(2)
    return PairLogps(chosen, rejected, chosen_lengths, rejected_lengths)
