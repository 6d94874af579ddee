"""Rank 1: segment attention, for packed rows in which both answers of a pair may share one prompt.

A row of L tokens holds segments (start, end, prefix_start, prefix_end). The tokens start..end attend causally to
themselves and, in full, to the prefix: two calls of SDPA a pair, and no L x L mask. Registered with transformers, so
that every model which takes an attention function by name can use it; without segments it is plain SDPA.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sdpo_lightning.tiles import MAX_KEYS, tiled_attention
from sdpo_lightning.types import Segments

NAME = "segment_sdpa"


def register_segment_attention() -> str:
    """Make the attention known to transformers; returns the name to load a model with."""
    AttentionInterface.register(NAME, _segment_attention)
    AttentionMaskInterface.register(NAME, _segment_mask)
    return NAME


def _segment_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """SDPA's mask for padded rows; none for packed ones, whose segments say all."""
    if attention_mask is None and q_length == kv_length and q_length > 1 and kwargs.get("local_size") is None:
        return None
    return sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask, **kwargs
    )


# Within a compiled layer it stands apart: each row has segments of its own, and none is worth a compilation.
@torch.compiler.disable
def _segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer.

    Args:
        module: the attention layer.
        query: `[1, H, L, E]`.
        key: `[1, K, L, E]`, K divides H.
        value: `[1, K, L, E]`.
        attention_mask: unused where there are segments.
        dropout: probability.
        scaling: factor on the scores; default 1 / sqrt(E).
        segments: of the row; None is plain SDPA.
        sliding_window: tokens that a query sees, itself included; None is all.
        kwargs: what other attention functions take.

    Returns:
        `[1, L, H, E]`, and None for the weights.

    Raises:
        ValueError: a model that caps its scores.
    """
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if kwargs.get("softcap") is not None:
        raise ValueError("attention scores with a softcap")
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        query, key, value = (t.to(torch.get_autocast_dtype(kind)) for t in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if _fits_tiles(query, value, segments, dropout):
        out = tiled_attention(query[0], key[0], value[0], segments, scale, sliding_window)[None]
    else:
        out = _sdpa_by_segment(query, key, value, segments, scale, sliding_window, dropout)
    return out.transpose(1, 2).contiguous(), None


def _fits_tiles(query: Tensor, value: Tensor, segments: Segments, dropout: float) -> bool:
    longest = max(end - start + prefix_end - prefix_start for start, end, prefix_start, prefix_end in segments)
    same_size = query.shape[-1] == value.shape[-1]
    return query.device.type == "cpu" and longest <= MAX_KEYS and same_size and not dropout


def _sdpa_by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
    dropout: float,
) -> Tensor:
    parts = []
    for start, end, prefix_start, prefix_end in segments:
        prefix = prefix_end - prefix_start
        keys, values = (t[:, :, start:end] for t in (key, value))
        if prefix:
            keys = torch.cat([key[:, :, prefix_start:prefix_end], keys], 2)
            values = torch.cat([value[:, :, prefix_start:prefix_end], values], 2)
        mask = _mask(end - start, prefix, window, query.device)
        parts.append(
            F.scaled_dot_product_attention(
                query[:, :, start:end],
                keys,
                values,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=key.shape[1] != query.shape[1],
            )
        )
    return torch.cat(parts, 2)


def _mask(length: int, prefix: int, window: int | None, device: torch.device) -> Tensor | None:
    """`[length, prefix + length]` bool, causal from the lower right; None where plain causality says the same."""
    if not prefix and (window is None or window >= length):
        return None
    queries = torch.arange(prefix, prefix + length, device=device)[:, None]
    keys = torch.arange(prefix + length, device=device)
    mask = keys <= queries
    return mask if window is None else mask & (keys > queries - window)
