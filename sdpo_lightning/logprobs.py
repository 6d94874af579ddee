"""Rank 1: hidden states -> token logps -> pair logps, without the logits of prompts and padding.

Only the N completion positions go through the head. A plain linear head is fused with the log-softmax: the logits of
all rows are made for a tile of the vocabulary at a time, so that a tile's part of the weight's gradient is whole. If
[N, V] fits `logits_budget_mb`, the tiles are kept in the compute dtype and become their own gradients (3 matmuls), else
none is and they are made again in the backward pass (4 matmuls). Any other head runs as it is, checkpointed in chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdpo_lightning.casts import CASTS
from sdpo_lightning.types import PairLogps, PreferenceBatch

# Rows of the head come in multiples of this: a CPU keeps a kernel for each number.
ROWS = 64
# Most columns of logits that a CPU makes at once: with a thousand rows they take 4 MB in fp32.
COLUMNS = 1024


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
        tiles = _tiles(hidden, vocab, budget_mb)
        chosen = hidden.new_zeros(count, dtype=torch.float32)
        # log sum exp over each tile, and log of its sum of squared shares.
        normalisers = hidden.new_empty(count, len(tiles), dtype=torch.float32)
        squares = torch.empty_like(normalisers) if collisions else None
        # One buffer, a tile after the other: many small ones would leave holes behind.
        kept = hidden.new_empty(count * vocab) if keeps else None
        for index, columns in enumerate(tiles):
            logits = _logits(hidden, weight, bias, scale, columns)
            inside, places = _within(targets, columns)
            chosen = torch.where(inside, logits.gather(1, places).squeeze(1), chosen)
            shares = logits.softmax(1)
            # The largest share is 1 / columns at least, so that its log is sound.
            normalisers[:, index] = logits.amax(1) - shares.amax(1).log()
            if squares is not None:
                squares[:, index] = 2 * torch.linalg.vector_norm(shares, dim=1).log()
            if kept is not None:
                _kept_tile(kept, count, columns).copy_(shares)
        normaliser = normalisers.logsumexp(1)
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers, chosen - normaliser)
        ctx.kept, ctx.tiles, ctx.scale, ctx.dtype = kept, tiles, scale, trained_weight.dtype
        repeated = None
        if squares is not None:
            repeated = (squares + 2 * (normalisers - normaliser[:, None])).logsumexp(1)
            ctx.mark_non_differentiable(repeated)
        return chosen - normaliser, repeated

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradient `[N]` of the logps to those of hidden `[N, D]`, weight `[V, D]` and bias `[V]`, where asked for."""
        hidden, weight, bias, targets, normalisers, logps = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        factors = -ctx.scale * gradient
        # In fp32 and before any rounding: 1 - p of a sure token would be lost in bf16.
        at_targets = (factors * logps.expm1()).to(hidden.dtype)
        normaliser = normalisers.logsumexp(1, keepdim=True)
        d_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32) if wants_hidden else None
        d_weight = weight.new_empty(weight.shape, dtype=ctx.dtype) if wants_weight else None
        d_bias = weight.new_empty(len(weight), dtype=ctx.dtype) if wants_bias else None
        # What was kept is consumed: a second backward pass makes it again.
        kept, ctx.kept = ctx.kept, None
        for index, columns in enumerate(ctx.tiles):
            if kept is not None:
                d_logits = _kept_tile(kept, len(hidden), columns)
                of_all = (normalisers[:, index, None] - normaliser).exp_()
                d_logits.mul_(of_all.mul_(factors[:, None]).to(d_logits.dtype))
            else:
                softmax = _logits(hidden, weight, bias, ctx.scale, columns).sub_(normaliser).exp_()
                d_logits = softmax.mul_(factors[:, None]).to(hidden.dtype)
            inside, places = _within(targets, columns)
            others = d_logits.gather(1, places)
            d_logits.scatter_(1, places, torch.where(inside[:, None], at_targets[:, None], others))
            if d_hidden is not None:
                d_hidden.add_(d_logits @ weight[columns])
            if d_weight is not None:
                d_weight[columns] = d_logits.t() @ hidden
            if d_bias is not None:
                d_bias[columns] = d_logits.sum(0, dtype=torch.float32)
        d_hidden = None if d_hidden is None else d_hidden.to(hidden.dtype)
        return d_hidden, d_weight, d_bias, None, None, None


def tile_width(rows: int, vocab: int, budget_mb: float, on_cpu: bool) -> int:
    """Columns whose fp32 logits and softmax, of all rows, fit the budget; on a CPU its cache too.

    Args:
        rows: completion positions that go through the head together.
        vocab: V, rows of the head.
        budget_mb: MiB.
        on_cpu: where it is computed.
    """
    width = int(budget_mb * 2**20 / (8 * max(1, rows)))
    width = min(width, COLUMNS) if on_cpu else width
    # Whole kernels' worth, where it is so much.
    return min(vocab, width // ROWS * ROWS or max(1, width))


def _tiles(hidden: Tensor, vocab: int, budget_mb: float) -> list[slice]:
    width = tile_width(len(hidden), vocab, budget_mb, hidden.device.type == "cpu")
    return [slice(start, min(start + width, vocab)) for start in range(0, vocab, width)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, columns: slice) -> Tensor:
    part = None if bias is None else bias[columns]
    logits = nn.functional.linear(hidden, weight[columns], part).float()
    return logits.mul_(scale) if scale != 1.0 else logits


def _within(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Which targets `[N]` lie in the columns, and the place `[N, 1]` of each there, any for the others."""
    inside = (targets >= columns.start) & (targets < columns.stop)
    places = (targets - columns.start).clamp(0, columns.stop - columns.start - 1)
    return inside, places[:, None]


def _kept_tile(kept: Tensor, count: int, columns: slice) -> Tensor:
    """The `[N, columns]` of `[N * V]` that belong to a tile."""
    return kept[count * columns.start : count * columns.stop].view(count, columns.stop - columns.start)


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
