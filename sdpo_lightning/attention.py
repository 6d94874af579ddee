"""Rank 1: segment attention, for packed rows in which both answers of a pair may share one prompt.

A row of L tokens holds segments (start, end, prefix_start, prefix_end). The tokens start..end attend causally to
themselves and, in full, to the prefix, without an L x L mask: on a GPU by one call for the row, elsewhere by one for
each segment. Registered with transformers, so that every model which takes an attention function by name can use it;
without segments it is plain SDPA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sdpo_lightning.kernels_cuda import (
    KeyIndex,
    build_block_mask,
    build_key_index,
    fits_flash,
    fits_flex,
    flex_segment_attention,
    has_flash,
    varlen_attention,
)
from sdpo_lightning.last_layer import ReadPositions, read_positions
from sdpo_lightning.tiles import MAX_KEYS, tiled_attention
from sdpo_lightning.types import PreferenceBatch, Segments

NAME = "segment_sdpa"

Path = Literal["tiles", "varlen", "flex", "sdpa"]

_packed: ContextVar[bool] = ContextVar("packed", default=False)


class SegmentPlan:
    """The segments of a packed row, and what the kernels need to know of them: made once, for all layers.

    Args:
        bounds: the segments; together, in order, they cover the row.
        device: of the row.
        read: positions that are read behind the last layer; None is all.
    """

    # A plain class: FSDP would copy a dataclass for each layer, and what it holds would be made again.
    def __init__(self, bounds: Segments, device: torch.device | str, read: ReadPositions | None = None) -> None:
        ends = [0, *(end for _, end, _, _ in bounds)]
        assert [start for start, _, _, _ in bounds] == ends[:-1], "segments have a gap"
        self.bounds, self.read = bounds, read
        self.device = torch.device(device)
        self.length = ends[-1]
        self.longest = max(end - start + prefix_end - prefix_start for start, end, prefix_start, prefix_end in bounds)
        self._key_index: KeyIndex | None = None
        self._block_masks: dict[int | None, BlockMask] = {}

    @property
    def key_index(self) -> KeyIndex:
        """For the variable-length kernel."""
        if self._key_index is None:
            self._key_index = build_key_index(self.bounds, self.device)
        return self._key_index

    def block_mask(self, window: int | None) -> BlockMask:
        """For FlexAttention; one for each window (tokens, the query included; None is all)."""
        window = None if window is None or window >= self.longest else window
        if window not in self._block_masks:
            self._block_masks[window] = build_block_mask(self.bounds, window, self.device)
        return self._block_masks[window]


def segment_arguments(batch: PreferenceBatch, leaves_out: bool = True) -> dict[str, SegmentPlan]:
    """What a model is given beside a packed row; nothing beside padded ones.

    Args:
        batch: on its device.
        leaves_out: what isn't read of the last layer isn't computed there.
    """
    if batch.segments is None:
        return {}
    read = read_positions(batch.source_index, batch.input_ids.numel()) if leaves_out else None
    return {"segments": SegmentPlan(batch.segments, batch.input_ids.device, read)}


@contextmanager
def packed_rows(packed: bool = True) -> Iterator[None]:
    """Within it a model is given segments, and transformers need not build a mask of its own."""
    token = _packed.set(packed)
    try:
        yield
    finally:
        _packed.reset(token)


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
    if _packed.get():
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
    segments: SegmentPlan | None = None,
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
    out = _by_segments(query, key, value, segments, scale, sliding_window, dropout)
    return out.transpose(1, 2).contiguous(), None


def _by_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: SegmentPlan,
    scale: float,
    window: int | None,
    dropout: float,
) -> Tensor:
    path = choose_path(plan, query.dtype, (query.shape[-1], value.shape[-1]), dropout)
    if path == "tiles":
        return tiled_attention(query[0], key[0], value[0], plan.bounds, scale, window)[None]
    if path == "varlen":
        return varlen_attention(query[0], key[0], value[0], plan.key_index, scale, window)[None]
    if path == "flex":
        return flex_segment_attention(query, key, value, plan.block_mask(window), scale)
    return _sdpa_by_segment(query, key, value, plan.bounds, scale, window, dropout)


def choose_path(plan: SegmentPlan, dtype: torch.dtype, sizes: tuple[int, int], dropout: float = 0.0) -> Path:
    """The fastest exact way for a row.

    Args:
        plan: the row's segments and device.
        dtype: of queries, keys and values.
        sizes: numbers of a query's head, and of a value's.
        dropout: probability; only SDPA has it.
    """
    kind = plan.device.type
    if dropout:
        return "sdpa"
    if kind == "cpu":
        return "tiles" if plan.longest <= MAX_KEYS and sizes[0] == sizes[1] else "sdpa"
    if kind == "cuda" and fits_flash(dtype, *sizes) and has_flash(plan.device):
        return "varlen"
    return "flex" if kind == "cuda" and fits_flex(plan.length, *sizes) else "sdpa"


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
