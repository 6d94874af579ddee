"""Rank 0: RMS norms (arXiv 1910.07467) that keep their input for the backward pass, and one number a token.

Autograd keeps the input in fp32 and the normalised numbers too, and goes over them a dozen times; both follow from the
input. Values are those of the model's own norms bit for bit, gradients are computed in fp32.
"""

from __future__ import annotations

from inspect import signature
from typing import Any, NamedTuple

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


_KNOWN: dict[type[nn.Module], type[nn.Module] | None] = {}


def keep_less_in_norms(model: nn.Module) -> int:
    """Give the RMS norms of a model a backward pass of our own.

    Args:
        model: of transformers; its weights and their names stay. Norms of a form that isn't known stay as they are.

    Returns:
        How many norms have it now.
    """
    found = 0
    for module in model.modules():
        # By class, not by the numbers of this module: it may have none yet.
        if type(module).__name__.endswith("RMSNorm") and (lean := _lean_class(type(module))) is not None:
            module.__class__ = lean
            found += 1
    return found


def _lean_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """A subclass that computes the same; None where the class isn't known to compute any form."""
    if issubclass(kind, _Lean):
        return kind
    if kind not in _KNOWN:
        form = _form_of(kind)
        _KNOWN[kind] = None if form is None else _subclass(kind, form)
    return _KNOWN[kind]


def _subclass(kind: type[nn.Module], form: Form) -> type[nn.Module]:
    def forward(self: nn.Module, hidden: Tensor) -> Tensor:
        weight = self.weight
        assert isinstance(weight, Tensor)
        if hidden.dtype not in DTYPES or weight.dtype not in DTYPES or torch.compiler.is_compiling():
            return kind.forward(self, hidden)
        return _RMSNorm.apply(hidden, weight, form, _epsilon(self))

    return type(kind.__name__, (kind, _Lean), {"forward": forward, "__module__": kind.__module__})


def _form_of(kind: type[nn.Module]) -> Form | None:
    """The form that gives the values of a new norm of the class in both dtypes, if there is one."""
    # One that may be given more than its input may do more; PyTorch's own has kernels.
    if issubclass(kind, nn.RMSNorm) or len(signature(kind.forward).parameters) != 2:
        return None
    # With values, whatever the model around it is made of.
    with unset_fake_temporarily(), torch.device("cpu"), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        hidden, weight = torch.randn(32, 8, generator=generator), torch.randn(8, generator=generator)
        # So small that the epsilon counts.
        hidden[16:] *= 0.1
        cases = []
        for dtypes in ((a, b) for a in DTYPES for b in DTYPES):
            try:
                norm = kind(8, eps=0.01).to(dtypes[1])
                norm.load_state_dict({"weight": weight})
                given = hidden.to(dtypes[0])
                cases.append(((given, norm.weight), _epsilon(norm), norm(given)))
            except (TypeError, RuntimeError, KeyError):
                return None
        for form in FORMS:
            found = [(_RMSNorm.apply(*tensors, form, epsilon), expected) for tensors, epsilon, expected in cases]
            if all(ours.dtype == theirs.dtype and torch.equal(ours, theirs) for ours, theirs in found):
                return form
    return None


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
        d_weight = by_feature.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
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
