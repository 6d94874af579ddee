"""Rank 0: segment attention on a CPU, for short segments: tiles of queries, their probabilities kept.

PyTorch's own kernel makes the scores again in the backward pass, key block by key block; where a segment sees some
hundred keys, keeping the probabilities costs less memory than one MLP activation and takes half the time. The
products are in fp32 also for bf16 inputs: that path keeps no compiled kernel for each new length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Most keys that a segment may see here; beyond, what is kept would outgrow the other activations.
MAX_KEYS = 512
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
            keys, values = _visible(key, segment), _visible(value, segment)
            for rows, seen in _tiles(segment):
                queries = query[:, :, rows].float()
                scores = torch.bmm(queries.flatten(1, 2), keys[:, :seen].transpose(1, 2))
                # All heads share the mask.
                mask = _mask(queries.shape[2], seen, window)
                masked = torch.add(mask, scores.view(*queries.shape[:3], seen), alpha=scale)
                probabilities = masked.softmax(-1).view_as(scores)
                out[:, :, rows] = torch.bmm(probabilities, values[:, :seen]).view_as(queries)
                if keeps:
                    kept.append(probabilities.to(query.dtype))
        ctx.save_for_backward(query, key, value, *kept)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient `[K, G, L, E]` of the output to those of query, key and value, in their shapes and dtypes."""
        query, key, value, *kept = ctx.saved_tensors
        d_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        d_key, d_value = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (key, value))
        tiles = iter(kept)
        for segment in ctx.segments:
            keys, values = _visible(key, segment), _visible(value, segment)
            d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
            for rows, seen in _tiles(segment):
                queries, d_out = (t[:, :, rows].float() for t in (query, gradient))
                d_out, probabilities = d_out.flatten(1, 2), next(tiles).float()
                d_values[:, :seen].baddbmm_(probabilities.transpose(1, 2), d_out)
                d_probabilities = torch.bmm(d_out, values[:, :seen].transpose(1, 2))
                # The derivative of softmax in one pass: p * (d - sum(p * d)).
                d_scores = torch._softmax_backward_data(d_probabilities, probabilities, -1, torch.float32)
                d_rows = torch.bmm(d_scores, keys[:, :seen]).mul_(ctx.scale)
                d_query[:, :, rows] = d_rows.view_as(queries)
                d_keys[:, :seen].baddbmm_(d_scores.transpose(1, 2), queries.flatten(1, 2), alpha=ctx.scale)
            _add_visible(d_key, d_keys, segment)
            _add_visible(d_value, d_values, segment)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None, None


def _visible(tensor: Tensor, segment: tuple[int, int, int, int]) -> Tensor:
    """`[K, prefix + own, E]` fp32: what the last token of a segment sees."""
    start, end, prefix_start, prefix_end = segment
    own = tensor[:, start:end]
    seen = own if prefix_start == prefix_end else torch.cat([tensor[:, prefix_start:prefix_end], own], 1)
    return seen.float()


def _add_visible(total: Tensor, part: Tensor, segment: tuple[int, int, int, int]) -> None:
    start, end, prefix_start, prefix_end = segment
    prefix = prefix_end - prefix_start
    total[:, prefix_start:prefix_end] += part[:, :prefix]
    total[:, start:end] += part[:, prefix:]


def _tiles(segment: tuple[int, int, int, int]) -> list[tuple[slice, int]]:
    """Rows of each tile, and how many keys its last query sees."""
    start, end, prefix_start, prefix_end = segment
    starts = range(start, end, TILE)
    ends = [min(first + TILE, end) for first in starts]
    prefix = prefix_end - prefix_start
    return [(slice(first, last), prefix + last - start) for first, last in zip(starts, ends, strict=True)]


def _mask(queries: int, seen: int, window: int | None) -> Tensor:
    """`[queries, seen]`, 0 or -inf: the last query sees all, or the last `window`."""
    first = seen - queries
    mask = torch.full((queries, seen), float("-inf")).triu_(first + 1)
    if window is not None and window < seen:
        mask += torch.full((queries, seen), float("-inf")).tril_(first - window)
    return mask
