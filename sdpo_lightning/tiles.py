"""Rank 0: segment attention on a CPU: tiles of queries against all keys that they see.

PyTorch's own kernel makes the scores again in the backward pass, key block by key block; where a segment sees some
hundred keys, keeping the probabilities costs less memory than one MLP activation and takes half the time. Above that
they are made again here too. Scores are products in fp32 also for bf16 inputs. So are the others where a segment is
short; where it is long they are in bf16, twice as fast, in sizes that are rounded up: a CPU keeps a kernel for each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Most keys that a segment may see here: a tile's scores are whole rows.
MAX_KEYS = 4096
# Most keys of a segment whose probabilities are kept; beyond, they would outgrow the other activations.
KEPT_KEYS = 512
# Keys of a segment from which on products of bf16 numbers are faster, rounding and all.
BF16_KEYS = 256
# Queries at once: their scores over all heads of a small model stay in a core's cache.
TILE = 64


def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: tuple[tuple[int, int, int, int], ...],
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention within segments, each of which may see a prefix that stands earlier in the row.

    Args:
        query: `[H, L, E]`.
        key: `[K, L, E]`, K divides H.
        value: `[K, L, E]`.
        segments: (start, end, prefix_start, prefix_end) of each; together they cover the row.
        scale: factor on the scores.
        window: tokens that a query sees, itself included; None is all.

    Returns:
        `[H, L, E]` in the dtype of `query`.
    """
    grouped = query.unflatten(0, (key.shape[0], -1))
    return _TiledAttention.apply(grouped, key, value, segments, scale, window).flatten(0, 1)


class _TiledAttention(torch.autograd.Function):
    """softmax(scale q k^T + causal mask) v, one tile of queries of one segment at a time."""

    # Autocast would turn the fp32 products into bf16 ones.
    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: tuple[tuple[int, int, int, int], ...],
        scale: float,
        window: int | None,
    ) -> Tensor:
        """`[K, G, L, E]` of query and `[K, L, E]` of key and value to `[K, G, L, E]`; else as `tiled_attention`."""
        out, kept = torch.empty_like(query, memory_format=torch.contiguous_format), []
        keeps = any(ctx.needs_input_grad)
        for segment in segments:
            plan = _plan(segment, query.dtype)
            keys, values = _visible(key, segment, plan), _visible(value, segment, plan).to(plan.dtype)
            for tile in plan.tiles:
                queries = _rows(query, tile, plan).float() * scale
                probabilities = _probabilities(queries, keys, tile, window)
                product = torch.bmm(probabilities.to(plan.dtype), values[:, : tile.seen])
                out[:, :, tile.rows] = product.view_as(queries)[:, :, : tile.number]
                if keeps and plan.keeps:
                    kept.append(probabilities.to(query.dtype))
        ctx.save_for_backward(query, key, value, *kept)
        ctx.segments, ctx.scale, ctx.window = segments, scale, window
        return out

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient `[K, G, L, E]` of the output to those of query, key and value, in their shapes and dtypes."""
        query, key, value, *saved = ctx.saved_tensors
        d_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        d_key, d_value = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (key, value))
        kept = iter(saved)
        for segment in ctx.segments:
            plan = _plan(segment, query.dtype)
            keys, values = _visible(key, segment, plan), _visible(value, segment, plan)
            factors = keys.to(plan.dtype)
            d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
            for tile in plan.tiles:
                queries, d_out = (_rows(t, tile, plan) for t in (query, gradient))
                scaled = queries.float() * ctx.scale
                made = next(kept) if plan.keeps else _probabilities(scaled, keys, tile, ctx.window)
                probabilities, d_out = made.float(), d_out.flatten(1, 2)
                _add_product(d_values[:, : tile.seen], made.to(plan.dtype).mT, d_out.to(plan.dtype))
                d_probabilities = torch.bmm(d_out.float(), values[:, : tile.seen].mT)
                # The derivative of softmax in one pass: p * (d - sum(p * d)).
                d_scores = torch._softmax_backward_data(d_probabilities, probabilities, -1, torch.float32)
                d_scores = d_scores.to(plan.dtype)
                d_rows = torch.bmm(d_scores, factors[:, : tile.seen]).mul_(ctx.scale)
                d_query[:, :, tile.rows] = d_rows.view_as(queries)[:, :, : tile.number]
                _add_product(d_keys[:, : tile.seen], d_scores.mT, scaled.flatten(1, 2).to(plan.dtype))
            _add_visible(d_key, d_keys, segment)
            _add_visible(d_value, d_values, segment)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None, None


class _Tile(NamedTuple):
    """Queries of a segment: their place in the row, their number, the first's place among the keys, keys to look at."""

    rows: slice
    number: int
    first: int
    seen: int


class _Plan(NamedTuple):
    """How a segment is computed: its tiles, the dtype of all products but the scores', whether probabilities stay."""

    tiles: list[_Tile]
    dtype: torch.dtype
    keeps: bool

    @property
    def rounded(self) -> bool:
        """Whether queries and keys come in whole tiles."""
        return self.dtype != torch.float32


def _plan(segment: tuple[int, int, int, int], dtype: torch.dtype) -> _Plan:
    start, end, prefix_start, prefix_end = segment
    prefix = prefix_end - prefix_start
    total = prefix + end - start
    low = dtype == torch.bfloat16 and total >= BF16_KEYS
    tiles = []
    for start_of_tile in range(start, end, TILE):
        last = min(start_of_tile + TILE, end)
        first = prefix + start_of_tile - start
        # Also a query of zeros, behind the last, has a key of its own: no window leaves it without any.
        seen = _up(first + TILE) if low else prefix + last - start
        tiles.append(_Tile(slice(start_of_tile, last), last - start_of_tile, first, seen))
    return _Plan(tiles, torch.bfloat16 if low else torch.float32, total <= KEPT_KEYS)


def _up(length: int) -> int:
    return -(-length // TILE) * TILE


def _rows(tensor: Tensor, tile: _Tile, plan: _Plan) -> Tensor:
    """`[K, G, rows, E]` of a tile, with zeros up to a whole one where sizes are rounded."""
    rows = tensor[:, :, tile.rows]
    return F.pad(rows, (0, 0, 0, TILE - tile.number)) if plan.rounded and tile.number < TILE else rows


def _probabilities(queries: Tensor, keys: Tensor, tile: _Tile, window: int | None) -> Tensor:
    """`[K, G * rows, seen]` fp32 of `[K, G, rows, E]` queries, which are scaled already."""
    scores = torch.bmm(queries.flatten(1, 2), keys[:, : tile.seen].mT)
    _mask(scores.view(*queries.shape[:3], -1), tile, window)
    return scores.softmax(-1)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product to an fp32 total: fp32 ones in one call, bf16 ones are rounded before."""
    if left.dtype == total.dtype:
        total.baddbmm_(left, right)
    else:
        total += torch.bmm(left, right)


def _visible(tensor: Tensor, segment: tuple[int, int, int, int], plan: _Plan) -> Tensor:
    """`[K, prefix + own, E]` fp32: what the last token of a segment sees, with zeros up to what its tile looks at."""
    start, end, prefix_start, prefix_end = segment
    own = tensor[:, start:end]
    seen = own if prefix_start == prefix_end else torch.cat([tensor[:, prefix_start:prefix_end], own], 1)
    return F.pad(seen.float(), (0, 0, 0, plan.tiles[-1].seen - seen.shape[1]))


def _add_visible(total: Tensor, part: Tensor, segment: tuple[int, int, int, int]) -> None:
    start, end, prefix_start, prefix_end = segment
    prefix = prefix_end - prefix_start
    total[:, prefix_start:prefix_end] += part[:, :prefix]
    total[:, start:end] += part[:, prefix : prefix + end - start]


def _mask(scores: Tensor, tile: _Tile, window: int | None) -> None:
    """Put -inf into `[K, G, rows, seen]`: the first query sees the keys up to its own place, or the last `window`."""
    rows = scores.shape[2]
    # All heads share the mask, and all queries see what stands before the first.
    scores[..., tile.first :] += scores.new_full((rows, tile.seen - tile.first), float("-inf")).triu_(1)
    if window is not None and window < tile.first + rows:
        scores += scores.new_full((rows, tile.seen), float("-inf")).tril_(tile.first - window)
