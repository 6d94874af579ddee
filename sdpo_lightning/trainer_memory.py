"""Rank 1: all that training holds on a device, set aside while another process needs the memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from sdpo_lightning.casts import CASTS
from sdpo_lightning.parking import parked

log = logging.getLogger(__name__)


@contextmanager
def memory_released(
    models: Sequence[nn.Module], optimizers: Sequence[Optimizer], device: torch.device
) -> Iterator[None]:
    """Within it weights, buffers, gradients and optimizer states wait in the memory of the CPU.

    Each rank sets its own aside, and only those: no collective. What stays on a GPU is its context, the buffers of
    NCCL and the buckets of DDP.

    Args:
        models: policy and reference; shards too.
        optimizers: that are to step on afterwards.
        device: of this rank.
    """
    # Copies of weights would keep their memory.
    CASTS.release()
    for model in models:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # Weights may be whole since the last forward pass.
                module.reshard()
    tensors = [tensor for model in models for tensor in _of_model(model)]
    tensors += [tensor for optimizer in optimizers for tensor in _tensors(list(optimizer.state.values()))]
    with parked(tensors, device) as size:
        log.info("%s bytes of %s wait in the memory of the CPU", f"{size:,}", device)
        yield
    log.info("%s bytes are back on %s", f"{size:,}", device)


def _of_model(model: nn.Module) -> Iterator[Tensor]:
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    yield from model.buffers()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)
