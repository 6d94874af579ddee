"""Rank 0: an input that several linear layers take is cast once under autocast.

Autocast casts it for each of them, and autograd keeps each copy: of the input of queries, keys and values three.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn


class LastCast(threading.local):
    """The latest input of a thread and its copy, as long as the input lives."""

    def __init__(self) -> None:
        self._source: weakref.ref[Tensor] | None = None
        self._key: tuple[Any, ...] = ()
        self._copy: Tensor | None = None

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor in another dtype: the copy of the last call if that was of the same numbers and graph.

        Args:
            tensor: of any shape.
            dtype: of the copy.
        """
        # In inference mode no version tells of changes. The copy of a leaf would keep it alive by its graph.
        if tensor.is_inference() or torch.is_inference_mode_enabled() or (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(dtype)
        # A copy without a graph is no use where one is wanted.
        key = (dtype, torch.is_grad_enabled(), tensor.requires_grad, tensor._version)
        known = self._copy
        if known is not None and self._source is not None and self._source() is tensor and self._key == key:
            return known
        # First of all: an input that dies meanwhile must not take the new copy with it.
        self._source = self._copy = None
        copy = tensor.to(dtype)
        self._copy, self._key = copy, key
        self._source = weakref.ref(tensor, self._forget)
        return copy

    def _forget(self, source: weakref.ref[Tensor]) -> None:
        # Not that of a later input.
        if source is self._source:
            self._source = self._copy = None


_LAST = LastCast()


def share_input_casts(model: nn.Module) -> None:
    """Have the plain linear layers of a model share the casts of their inputs, where autocast is on.

    Values are the same; gradients to a shared input are added up in the lower dtype.

    Args:
        model: any; its weights and their names stay. Layers that share already are left as they are.
    """
    for module in model.modules():
        # Quantised ones look at the dtype that they are given.
        if type(module) is nn.Linear and _cast_input not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_cast_input)


def _cast_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if len(inputs) != 1 or torch.compiler.is_compiling():
        return None
    [tensor] = inputs
    kind = tensor.device.type
    # Without values there is no autocast, and asking for it is an error.
    if tensor.dtype != torch.float32 or tensor.is_meta or not torch.is_autocast_enabled(kind):
        return None
    return (_LAST.cast(tensor, torch.get_autocast_dtype(kind)),)
