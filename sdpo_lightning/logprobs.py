"""Rank 1: hidden states -> token logps -> pair logps, without the logits of prompts and padding.

Only the N completion positions go through the head. A plain linear head is fused with the log-softmax: its rows
are made in blocks; if [N, V] fits `logits_budget_mb`, ONE buffer of the compute dtype is
kept and becomes its own gradient (3 matmuls), else nothing is kept and the blocks are made again in the backward
pass (4 matmuls). Any other head runs as it is, checkpointed in chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdpo_lightning.casts import CASTS
from sdpo_lightning.types import PairLogps, PreferenceBatch

# Rows of the head come in multiples of this; a CPU, which keeps a kernel for each number, also takes so many at once.
ROWS = 64


def token_logps(
    hidden: Tensor,
    batch: PreferenceBatch,
    head: Callable[[Tensor], Tensor],
    vocab_size: int,
    logits_budget_mb: float = 256.0,
    collisions: bool = False,
) -> Tensor:
    """Log-probability of each completion token, by any head.

    Args:
        hidden: `[R, L, D]` last hidden states, after the final norm.
        batch: says which position predicts which token.
        head: maps `[n, D]` to logits `[n, V]`.
        vocab_size: V, rows of the head.
        logits_budget_mb: most MiB of fp32 logits that exist at once.
        collisions: also give log sum_v p_v^2 of each position.

    Returns:
        `[N]` float32, nats; with `collisions` `[2, N]`, whose second row has no gradient.
    """
    selected = hidden.flatten(0, 1)[batch.source_index]
    rows = max(1, int(logits_budget_mb * 2**20 / (4 * vocab_size)))
    gives = _logps_and_collisions_of if collisions else _logps_of
    if len(selected) <= rows:
        return gives(selected, batch.target_ids, head)
    chunks = zip(selected.split(rows), batch.target_ids.split(rows), strict=True)
    return torch.cat([checkpoint(gives, h, t, head, use_reentrant=False) for h, t in chunks], -1)


def linear_token_logps(
    hidden: Tensor,
    batch: PreferenceBatch,
    head: nn.Linear,
    scale: float = 1.0,
    logits_budget_mb: float = 256.0,
    collisions: bool = False,
) -> Tensor:
    """Log-probability of each completion token, by a plain linear head and its log-softmax in one.

    Args:
        hidden: `[R, L, D]` last hidden states, after the final norm.
        batch: says which position predicts which token.
        head: `[V, D]` weight and perhaps a bias.
        scale: factor on the logits.
        logits_budget_mb: most MiB of logits that are kept for the backward pass.
        collisions: also give log sum_v p_v^2 of each position.

    Returns:
        `[N]` float32, nats; with `collisions` `[2, N]`, whose second row has no gradient.
    """
    sources, targets = _rounded(batch.source_index), _rounded(batch.target_ids)
    selected = hidden.flatten(0, 1)[sources]
    kind = selected.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else selected.dtype
    # The gradient goes to the weight itself, in its dtype: through the copy it would be rounded, and held twice more.
    copies = tuple(None if t is None else CASTS.cast(t, dtype).detach() for t in (head.weight, head.bias))
    # Under `no_grad` autograd would still say that the weight needs a gradient, and logits would be kept for it.
    trained = (head.weight, head.bias) if torch.is_grad_enabled() else copies
    settings = (scale, logits_budget_mb, collisions)
    logps, repeated = _LinearLogps.apply(selected.to(dtype), *trained, copies, targets, settings)
    return (torch.stack([logps, repeated]) if collisions else logps)[..., : len(batch.target_ids)]


def _rounded(index: Tensor) -> Tensor:
    """`[N]` lengthened by zeros where N is large: each new N would cost kernels of its own."""
    extra = -len(index) % ROWS if len(index) > ROWS else 0
    return nn.functional.pad(index, (0, extra))


def _logps_of(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    # fp32 before the softmax: at logps of -1e4 a bf16 sum is off by tens of nats.
    return gather_logps(head(hidden), targets)


def _logps_and_collisions_of(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    logits = head(hidden)
    with torch.no_grad():
        free = logits.float()
        repeated = (2 * free).logsumexp(1) - 2 * free.logsumexp(1)
    return torch.stack([gather_logps(logits, targets), repeated])


class _LinearLogps(torch.autograd.Function):
    """logits[target] - logsumexp(logits), with logits = scale * (hidden @ weight.T + bias)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        trained_weight: Tensor,
        trained_bias: Tensor | None,
        copies: tuple[Tensor, Tensor | None],
        targets: Tensor,
        settings: tuple[float, float, bool],
    ) -> tuple[Tensor, Tensor | None]:
        """`[N]` logps in nats, and log sum_v p_v^2 `[N]` where asked for; both fp32.

        Args:
            ctx: of autograd.
            hidden: `[N, D]`, in the dtype of the products.
            trained_weight: `[V, D]`, which the gradient goes to.
            trained_bias: `[V]`, likewise.
            copies: weight and bias in the dtype of the products.
            targets: `[N]` token ids.
            settings: factor on the logits, MiB of logits to keep at most, whether the second result is asked for.
        """
        (weight, bias), (scale, budget_mb, collisions) = copies, settings
        count, vocab = len(hidden), len(weight)
        needs_grad = any(ctx.needs_input_grad[:3])
        keeps = needs_grad and count * vocab * hidden.element_size() <= budget_mb * 2**20
        kept = hidden.new_empty(count, vocab) if keeps else None
        logps = hidden.new_empty(count, dtype=torch.float32)
        normalisers = torch.empty_like(logps)
        repeated = torch.empty_like(logps) if collisions else None
        for rows in _blocks(count, _block_rows(hidden, vocab, budget_mb)):
            logits = _logits(hidden[rows], weight, bias, scale)
            chosen = targets[rows, None]
            target_logits, largest = logits.gather(1, chosen), logits.amax(1, keepdim=True)
            # In place: from here on the block holds exp(logits - largest).
            total = logits.sub_(largest).exp_().sum(1, keepdim=True)
            normalisers[rows] = (largest + total.log()).squeeze(1)
            logps[rows] = target_logits.squeeze(1) - normalisers[rows]
            if repeated is not None:
                repeated[rows] = 2 * (torch.linalg.vector_norm(logits, dim=1) / total.squeeze(1)).log()
            if kept is not None:
                kept[rows] = _minus_one_hot(logits.mul_(total.reciprocal()), chosen)
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers)
        ctx.kept, ctx.scale, ctx.budget_mb, ctx.dtype = kept, scale, budget_mb, trained_weight.dtype
        if repeated is not None:
            ctx.mark_non_differentiable(repeated)
        return logps, repeated

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradient `[N]` of the logps to those of hidden `[N, D]`, weight `[V, D]` and bias `[V]`, where asked for."""
        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        factors = -ctx.scale * gradient[:, None]
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = d_bias = None
        vocab = len(weight)
        # What was kept is consumed: a second backward pass makes it again.
        kept, ctx.kept = ctx.kept, None
        rows_at_once = len(hidden) if kept is not None else _budget_rows(hidden, vocab, ctx.budget_mb)
        for rows in _blocks(len(hidden), rows_at_once):
            if kept is not None:
                d_logits = kept.mul_(factors.to(kept.dtype))
            else:
                d_logits = hidden.new_empty(len(hidden[rows]), vocab)
                for inner in _blocks(len(d_logits), _block_rows(hidden, vocab, ctx.budget_mb)):
                    outer = slice(rows.start + inner.start, rows.start + inner.stop)
                    logits = _logits(hidden[outer], weight, bias, ctx.scale)
                    softmax = logits.sub_(normalisers[outer, None]).exp_()
                    residual = _minus_one_hot(softmax, targets[outer, None])
                    d_logits[inner] = residual.mul_(factors[outer])
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[rows])
            if wants_weight:
                part = torch.mm(d_logits.t(), hidden[rows])
                # Many chunks are summed in fp32: in bf16 the later ones would vanish.
                d_weight = part if len(part) and rows_at_once >= len(hidden) else _add(d_weight, part)
            if wants_bias:
                d_bias = _add(d_bias, d_logits.sum(0, dtype=torch.float32))
        # The logits make room before the weight's gradient is turned into its own dtype.
        kept = d_logits = None
        d_weight = None if d_weight is None else d_weight.to(ctx.dtype)
        d_bias = None if d_bias is None else d_bias.to(ctx.dtype)
        return d_hidden, d_weight, d_bias, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    logits = nn.functional.linear(hidden, weight, bias).float()
    return logits.mul_(scale) if scale != 1.0 else logits


def _minus_one_hot(softmax: Tensor, targets: Tensor) -> Tensor:
    # In fp32 and before any rounding: 1 - p of a sure token would be lost in bf16.
    return softmax.scatter_add_(1, targets, softmax.new_full(targets.shape, -1.0))


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part.float() if total is None else total.add_(part)


def _budget_rows(hidden: Tensor, vocab: int, budget_mb: float) -> int:
    return max(1, int(budget_mb * 2**20 / (vocab * hidden.element_size())))


def _block_rows(hidden: Tensor, vocab: int, budget_mb: float) -> int:
    # Of fp32 logits that exist for a moment.
    rows = max(1, int(budget_mb * 2**20 / (4 * vocab)))
    return min(ROWS, rows) if hidden.device.type == "cpu" else rows


def _blocks(count: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


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


def pair_logps(logps: Tensor, batch: PreferenceBatch, ld_alpha: float = 1.0) -> PairLogps:
    """Sum the token logps of each completion (arXiv 2305.18290: log pi(y | x)).

    Args:
        logps: `[N]` float32, from `token_logps`.
        batch: says which token belongs to which of its 2B sequences.
        ld_alpha: factor on tokens beyond the length of the pair's shorter completion (LD-DPO, arXiv 2409.06411).

    Returns:
        `PairLogps` of `[B]`, summed in float32; lengths are those of the whole completions.
    """
    if ld_alpha != 1.0:
        shorter = torch.minimum(*batch.completion_lengths.chunk(2)).repeat(2)
        shared = token_positions(batch) < shorter[batch.sequence_index]
        logps = torch.where(shared, logps, ld_alpha * logps)
    totals = logps.new_zeros(2 * batch.num_pairs).index_add(0, batch.sequence_index, logps)
    chosen, rejected = totals.chunk(2)
    chosen_lengths, rejected_lengths = batch.completion_lengths.chunk(2)
    return PairLogps(chosen, rejected, chosen_lengths, rejected_lengths, real=batch.weights > 0)


def token_positions(batch: PreferenceBatch) -> Tensor:
    """Place of each completion token within its completion, from 0, `[N]` int64; every layout keeps their order."""
    lengths = batch.completion_lengths
    order = batch.sequence_index.argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return places - (lengths.cumsum(0) - lengths)[batch.sequence_index]


def alignment_weights(logps: Tensor, collisions: Tensor, batch: PreferenceBatch) -> Tensor:
    """WPO's weight of each pair: w(y_w) * w(y_l), w(y) = exp(mean over tokens of log p(y_t) - log sum_v p_v^2).

    Zhou et al. 2024 (arXiv 2406.11827, Eq. 1 for the product, Eq. 2 for w: its sampled alignment).

    Args:
        logps: `[N]` of the completion tokens, nats.
        collisions: `[N]` log sum_v p_v^2 at their positions.
        batch: says which token belongs to which sequence.

    Returns:
        `[B]` without gradient.
    """
    aligned = logps.detach() - collisions.detach()
    totals = aligned.new_zeros(2 * batch.num_pairs).index_add(0, batch.sequence_index, aligned)
    chosen, rejected = (totals / batch.completion_lengths.clamp(min=1)).exp().chunk(2)
    return chosen * rejected
