"""Rank 0: what waits in the memory of the CPU: activations for the backward pass, weights for the next forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

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


class ParkedWeights:
    """Frozen weights that are on the device only during a forward pass. Going home costs nothing: the copy is dropped.

    Args:
        model: frozen; its weights move to the memory of the CPU.
    """

    def __init__(self, model: nn.Module) -> None:
        self._homes: list[tuple[nn.Parameter, Tensor]] = []
        for parameter in model.parameters():
            home = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=parameter.is_cuda)
            parameter.data = home.copy_(parameter.data)
            self._homes.append((parameter, home))

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """The weights are on `device` within."""
        for parameter, home in self._homes:
            parameter.data = home.to(device, non_blocking=True)
        try:
            yield
        finally:
            for parameter, home in self._homes:
                parameter.data = home
