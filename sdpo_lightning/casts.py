"""Rank 0: autocast's low-precision copies of the weights, made once for several forward passes.

Left alone, autocast casts each weight again in every micro-batch (and again where activations are recomputed).
Here its cache stays open from the first micro-batch of an optimizer step until that step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle


class WeightCasts:
    """Low-precision copies of weights, kept between `hold` and `release`. One at a time in a process.

    Copies made without gradients have no graph, so that those of one mode are never seen in the other.
    """

    def __init__(self) -> None:
        self._hook: RemovableHandle | None = None
        self._with_grad = False
        # With the weight itself, so that its id can't come to be another's.
        self._copies: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}

    @property
    def is_held(self) -> bool:
        """Whether copies are kept."""
        return self._hook is not None

    def hold(self) -> None:
        """Keep copies from now on. Any optimizer's step ends it, whoever calls that: they would be stale."""
        if self.is_held:
            if self._with_grad == torch.is_grad_enabled():
                return
            self.release()
        self._with_grad = torch.is_grad_enabled()
        torch.clear_autocast_cache()
        # An outermost autocast context empties the cache when it ends; within this one it isn't outermost.
        torch.autocast_increment_nesting()
        self._hook = register_optimizer_step_post_hook(lambda *_: self.release())

    def release(self) -> None:
        """Forget the copies."""
        if self._hook is None:
            return
        self._hook.remove()
        self._hook = None
        self._copies.clear()
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()

    @contextmanager
    def held(self) -> Iterator[None]:
        """`hold` and `release` around a pass over many batches."""
        self.hold()
        try:
            yield
        finally:
            self.release()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Around one forward pass: whether autocast may keep and use copies in it."""
        before = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(self._applies() if self.is_held else before)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(before)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Around `generate`, within autocast and without gradients: each of its tokens is a forward pass."""
        with self.held(), self.in_use():
            yield

    def cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """A weight in another dtype, for kernels that autocast doesn't know.

        Args:
            weight: of any shape.
            dtype: of the copy; the weight itself if it has it.
        """
        if weight.dtype == dtype or not self._applies():
            return weight.to(dtype)
        key = (id(weight), dtype)
        if key not in self._copies:
            self._copies[key] = (weight, weight.to(dtype))
        return self._copies[key][1]

    def _applies(self) -> bool:
        return self.is_held and self._with_grad == torch.is_grad_enabled()


CASTS = WeightCasts()
