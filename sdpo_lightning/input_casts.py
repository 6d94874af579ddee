"""Rank 0: an input that several linear layers take is cast once under autocast.

Autocast casts it for each of them, and autograd keeps each copy: of the input of queries, keys and values three.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn


class LastCast:
    """The latest input and its copy, as long as the input lives."""

    def __init__(self) -> None:
        self._source: weakref.ref[Tensor] | None = None
        self._key: tuple[Any, ...] = ()
        self._copy: Tensor | None = None

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor in another dtype: the copy of the last call if that was of the same numbers.

        Args:
            tensor: of any shape.
            dtype: of the copy.
        """
        # A copy without a graph is no use where one is wanted; an inference tensor has no version.
        key = (dtype, torch.is_grad_enabled(), None if tensor.is_inference() else tensor._version)
        if self._copy is None or self._source is None or self._source() is not tensor or self._key != key:
            self._copy, self._key = tensor.to(dtype), key
            self._source = weakref.ref(tensor, self._forget)
        return self._copy

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
    if tensor.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
        return None
    return (_LAST.cast(tensor, torch.get_autocast_dtype(kind)),)
