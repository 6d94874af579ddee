"""Rank 0: activations wait for the backward pass in the memory of the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

# Smaller ones aren't worth a transfer.
_LEAST_BYTES = 2**20


def offload_activations() -> torch.autograd.graph.saved_tensors_hooks:
    """A context in which large saved tensors, weights excepted, are moved to the CPU and back when they are needed.

    Meant for models whose layers are recomputed: then what is saved are the layers' inputs, `[R, L, D]` each.
    """
    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)


def _pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
    size = tensor.numel() * tensor.element_size()
    # Leaves are weights, or buffers that many layers share.
    if tensor.is_leaf or size < _LEAST_BYTES:
        return tensor
    return _move(tensor)


def _move(tensor: Tensor) -> tuple[torch.device, Tensor]:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return tensor.device, host.copy_(tensor.detach(), non_blocking=True)


def _unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    device, host = packed
    return host.to(device, non_blocking=True)
