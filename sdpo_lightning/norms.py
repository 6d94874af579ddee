"""Rank 0: RMS norms (arXiv 1910.07467) that keep their input for the backward pass, and one number a token.

Autograd keeps the input in fp32 and the normalised numbers too, and goes over them a dozen times; both follow from the
input. Values are those of the model's own norms bit for bit, which is tried for each, gradients are computed in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import signature
from itertools import product
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.function import once_differentiable

DTYPES = (torch.float32, torch.bfloat16)


class Form(NamedTuple):
    """What a class of norms does with the normalised numbers, which are fp32.

    Attributes:
        offset: added to the weights: 0 in Llama, 1 in Gemma.
        casts_first: they are rounded to the input's dtype before the weights, as in Llama, or behind, as in Gemma.
    """

    offset: float
    casts_first: bool


FORMS = (Form(0.0, True), Form(0.0, False), Form(1.0, False))


class _Lean:
    """Marks classes that are made here."""


_own: ContextVar[bool] = ContextVar("own", default=False)


@contextmanager
def own_norms() -> Iterator[None]:
    """Within it norms compute as the model's authors wrote them."""
    token = _own.set(True)
    try:
        yield
    finally:
        _own.reset(token)


def keep_less_in_norms(model: nn.Module) -> int:
    """Give the RMS norms of a model a backward pass of our own, which has no second derivative.

    Args:
        model: of transformers; its weights and their names stay. Norms of a form that isn't known stay as they are.

    Returns:
        How many norms have it now.
    """
    found = 0
    for module in model.modules():
        kind = type(module)
        # Liger puts classes of its own in the place of transformers' ones.
        if kind.__name__.endswith("RMSNorm") and kind.__module__.startswith("transformers.models."):
            form = None if isinstance(module, _Lean) else _form_of(module)
            module.__class__ = kind if form is None else _subclass(kind, form)
            found += isinstance(module, _Lean)
    return found


_SUBCLASSES: dict[tuple[type[nn.Module], Form], type[nn.Module]] = {}


def _subclass(kind: type[nn.Module], form: Form) -> type[nn.Module]:
    if (kind, form) not in _SUBCLASSES:
        _SUBCLASSES[kind, form] = _new_subclass(kind, form)
    return _SUBCLASSES[kind, form]


def _new_subclass(kind: type[nn.Module], form: Form) -> type[nn.Module]:
    def forward(self: nn.Module, hidden: Tensor) -> Tensor:
        weight = self.weight
        assert isinstance(weight, Tensor)
        known = hidden.dtype in DTYPES and weight.dtype in DTYPES
        if torch.compiler.is_compiling() or _own.get() or not known:
            return kind.forward(self, hidden)
        return _RMSNorm.apply(hidden, weight, form, _epsilon(self))

    def reduce(self: nn.Module, protocol: SupportsIndex) -> tuple[Any, ...]:
        # The class has no name to be found by.
        return _restored, (kind, form), self.__getstate__()

    members = {"forward": forward, "__reduce_ex__": reduce, "__module__": kind.__module__}
    return type(kind.__name__, (kind, _Lean), members)


def _restored(kind: type[nn.Module], form: Form) -> nn.Module:
    """A norm that gets its state next."""
    made = _subclass(kind, form)
    return made.__new__(made)


def _form_of(norm: nn.Module) -> Form | None:
    """The form of a norm, if it is one that its class makes from size and epsilon alone, and there is one for it."""
    kind, weight = type(norm), norm._parameters.get("weight")
    # One that may be given more than its input may do more.
    if weight is None or weight.dim() != 1 or len(signature(kind.forward).parameters) != 2:
        return None
    try:
        epsilon = _epsilon(norm)
        key = (kind, len(weight), epsilon)
        form, plain = _PROBED[key] = _PROBED.get(key) or _probed(*key)
        # What else it was given may change what it computes.
        return form if _settings(norm) == plain else None
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError):
        return None


def _settings(norm: nn.Module) -> dict[str, Any]:
    held = {name: value for name, value in vars(norm).items() if not name.startswith("_") and name != "training"}
    return held | {"parameters": sorted(dict(norm.named_parameters())), "buffers": sorted(dict(norm.named_buffers()))}


_PROBED: dict[tuple[type[nn.Module], int, float], tuple[Form | None, dict[str, Any]]] = {}


def _probed(kind: type[nn.Module], size: int, epsilon: float) -> tuple[Form | None, dict[str, Any]]:
    """The form that gives the values of a new norm of the class in both dtypes, and what that norm holds."""
    # With values, whatever the model around it is made of.
    with unset_fake_temporarily(), torch.device("cpu"), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        hidden, weight = torch.randn(32, size, generator=generator), torch.randn(size, generator=generator)
        # So small that the epsilon counts.
        hidden[16:] *= epsilon**0.5
        cases = []
        for inputs, weights in product(DTYPES, DTYPES):
            norm = kind(size, eps=epsilon).to(weights)
            norm.load_state_dict({"weight": weight})
            given = hidden.to(inputs)
            cases.append(((given, norm.weight), norm(given)))
        for form in FORMS:
            found = [(_RMSNorm.apply(*tensors, form, epsilon), expected) for tensors, expected in cases]
            if all(ours.dtype == theirs.dtype and torch.equal(ours, theirs) for ours, theirs in found):
                return form, _settings(norm)
    return None, {}


def _epsilon(norm: nn.Module) -> float:
    values = vars(norm)
    return float(values["variance_epsilon"] if "variance_epsilon" in values else values["eps"])


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + epsilon) * (weight + offset)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, form: Form, epsilon: float) -> Tensor:
        """`[..., D]` and `[D]` to `[..., D]`."""
        numbers = hidden.float()
        scale = torch.rsqrt(numbers.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(hidden, weight, scale)
        ctx.offset = form.offset
        normalised = numbers * scale
        if form.casts_first:
            normalised = normalised.to(hidden.dtype)
            return normalised.mul_(weight) if normalised.dtype == weight.dtype else weight * normalised
        return normalised.mul_(_factors(weight, form.offset)).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient `[..., D]` to those of input and weight, where asked for."""
        hidden, weight, scale = ctx.saved_tensors
        factors, gradient = _factors(weight, ctx.offset), gradient.float()
        normalised = hidden * scale
        by_feature = gradient * normalised
        d_weight = by_feature.reshape(-1, len(weight)).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None, None
        # A step along the input itself changes only its length, which the norm takes away again.
        with torch.autocast(gradient.device.type, enabled=False):
            along = (by_feature @ factors).unsqueeze(-1).div_(-hidden.shape[-1])
        d_hidden = torch.mul(gradient, factors).addcmul_(normalised, along).mul_(scale)
        return d_hidden.to(hidden.dtype), d_weight, None, None


def _factors(weight: Tensor, offset: float) -> Tensor:
    """`[D]` fp32."""
    return weight.float() + offset if offset else weight.float()
