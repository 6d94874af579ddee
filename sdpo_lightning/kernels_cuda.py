"""Rank 0: segment attention on a GPU, all segments of a row in one call.

First choice is flash attention's variable-length kernel, which takes other lengths for keys than for queries: the
keys of a shared prompt are gathered once for each segment that sees them. FlexAttention does fp32 and what flash
refuses; it reads a mask of blocks in place of gathered keys. Both run on a CPU too, where tests compare them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

varlen_attn: Callable[..., Any] | None
try:
    from torch.nn.attention import varlen

    varlen_attn = varlen.varlen_attn
except ImportError:
    varlen_attn = None

# Rows of fewer tokens are one block, in which there is nothing to skip.
FLEX_BLOCK = 128
# Triton's matrix products take no fewer columns.
_FLEX_MIN_SIZE = 16


class KeyIndex(NamedTuple):
    """What each of S segments sees, for a kernel that takes queries and keys of other lengths.

    Attributes:
        cu_seq_q: `[S + 1]` int32, where the queries of each segment begin, and the end.
        cu_seq_k: `[S + 1]` int32, the same of its gathered keys.
        max_q: most queries of a segment.
        max_k: most keys.
        gather: `[T]` int64, positions in the row of all keys, each segment's prefix before its own tokens; None where
            no segment has a prefix, and the keys stand in the row as they are.
    """

    cu_seq_q: Tensor
    cu_seq_k: Tensor
    max_q: int
    max_k: int
    gather: Tensor | None


def build_key_index(segments: tuple[tuple[int, int, int, int], ...], device: torch.device) -> KeyIndex:
    """Index tensors of a row.

    Args:
        segments: (start, end, prefix_start, prefix_end) of each; together, in order, they cover the row.
        device: of the tensors.
    """
    start, end, prefix_start, prefix_end = np.array(segments).T
    own, prefix = end - start, prefix_end - prefix_start
    gather = None
    if prefix.any():
        spans = [(first, last) for s, e, ps, pe in segments for first, last in ((ps, pe), (s, e))]
        gather = _moved(np.concatenate([np.arange(first, last) for first, last in spans]), device)
    return KeyIndex(
        cu_seq_q=_moved(_cumulated(own), device),
        cu_seq_k=_moved(_cumulated(own + prefix), device),
        max_q=int(own.max()),
        max_k=int((own + prefix).max()),
        gather=gather,
    )


def _cumulated(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], lengths.cumsum()]).astype(np.int32)


def _moved(array: np.ndarray, device: torch.device) -> Tensor:
    # Only from pinned memory does a copy not wait for what the GPU still has to do.
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@cache
def has_flash(device: torch.device) -> bool:
    """Whether `varlen_attn` runs on this CUDA device and knows windows and scales (torch 2.11 and later)."""
    # ROCm's kernels don't all align a causal mask to the lower right.
    if varlen_attn is None or torch.version.hip or "window_size" not in _parameters(varlen_attn):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def fits_flash(dtype: torch.dtype, size: int, value_size: int) -> bool:
    """Whether flash attention takes heads of `size` numbers (values of `value_size`) in this dtype."""
    return dtype in (torch.bfloat16, torch.float16) and size == value_size and size <= 256 and size % 8 == 0


def fits_flex(length: int, size: int, value_size: int) -> bool:
    """Whether FlexAttention takes such heads, and a row of `length` tokens is worth it."""
    return length >= FLEX_BLOCK and min(size, value_size) >= _FLEX_MIN_SIZE


@cache
def _parameters(kernel: Callable[..., Tensor]) -> frozenset[str]:
    return frozenset(inspect.signature(kernel).parameters)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: KeyIndex,
    scale: float,
    window: int | None = None,
    kernel: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Causal attention within segments and to their prefixes, by one call of a variable-length kernel.

    Args:
        query: `[H, L, E]`.
        key: `[K, L, E]`, K divides H.
        value: `[K, L, E]`.
        index: of the row's segments.
        scale: factor on the scores.
        window: tokens that a query sees, itself included; None is all.
        kernel: with the signature of `torch.nn.attention.varlen.varlen_attn`, which is the default.

    Returns:
        `[H, L, E]`.
    """
    kernel = varlen_attn if kernel is None else kernel
    assert kernel is not None, "`has_flash` is asked first"
    # [L, heads, E]: a view, as models compute it in that order anyway.
    query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    if index.gather is not None:
        key, value = (t.index_select(0, index.gather) for t in (key, value))
    grouped = query.shape[1] != key.shape[1]
    # torch 2.11 takes fewer key heads without being told.
    gqa = {"enable_gqa": True} if grouped and "enable_gqa" in _parameters(kernel) else {}
    # The kernel counts the tokens left of a query; -1 is all, and the 0 on the right is causality.
    left = -1 if window is None else window - 1
    # cu_seq_q, cu_seq_k, max_q, max_k.
    out = kernel(query, key, value, *index[:4], scale=scale, window_size=(left, 0), **gqa)
    return out.transpose(0, 1)


def build_block_mask(
    segments: tuple[tuple[int, int, int, int], ...], window: int | None, device: torch.device
) -> BlockMask:
    """FlexAttention's mask of a row.

    Args:
        segments: (start, end, prefix_start, prefix_end) of each; together, in order, they cover the row.
        window: tokens that a query sees, itself included; None is all.
        device: of the mask.
    """
    # Bounds are tensors, window included: FlexAttention compiles no numbers that change.
    own_first, prefix_first, prefix_end = _moved(_visible_bounds(segments, window), device)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (own_first[query] <= key) & (key <= query)
        return own | ((prefix_first[query] <= key) & (key < prefix_end[query]))

    length = segments[-1][1]
    return create_block_mask(visible, None, None, length, length, device=device, BLOCK_SIZE=FLEX_BLOCK)


def _visible_bounds(segments: tuple[tuple[int, int, int, int], ...], window: int | None) -> np.ndarray:
    """`[3, L]` int64: first own token that each token sees, first token of the prefix, and the prefix's end."""
    bounds = np.array(segments)
    start, _, prefix_start, prefix_end = np.repeat(bounds, bounds[:, 1] - bounds[:, 0], axis=0).T
    if window is None:
        return np.stack([start, prefix_start, prefix_end])
    position = np.arange(len(start))
    own_first = np.maximum(start, position - window + 1)
    # The prefix's last token stands just before the segment's first.
    prefix_first = np.maximum(prefix_start, prefix_end + position - start - window + 1)
    return np.stack([own_first, prefix_first, prefix_end])


def flex_segment_attention(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Causal attention within segments and to their prefixes, by FlexAttention.

    Args:
        query: `[1, H, L, E]`.
        key: `[1, K, L, E]`, K divides H.
        value: `[1, K, L, F]`.
        mask: of the row's segments.
        scale: factor on the scores.

    Returns:
        `[1, H, L, F]`.
    """
    grouped = query.shape[1] != key.shape[1]
    if query.device.type == "cuda":
        return _compiled_flex()(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)
    out: Any = flex_attention(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)
    return out


@cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention)
