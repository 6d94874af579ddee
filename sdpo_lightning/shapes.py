"""Rank 1: the sizes of a causal LM from its config alone: parameters, linear layers, what it keeps a token.

Parameters are counted on the meta device. What the forward pass keeps for the backward pass is counted by running one
and two layers on fake tensors, which have sizes and no memory: that holds for every architecture and precision.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from sdpo_lightning.input_casts import share_input_casts
from sdpo_lightning.norms import keep_less_in_norms
from sdpo_lightning.types import ConfigurationError

_TRACE = "size_trace"
_TRACE_TOKENS = (64, 128)


@dataclass(frozen=True)
class Linear:
    """Linear layers of one name and size within the decoder layers.

    Attributes:
        name: last part of the module's name, as `q_proj`.
        inputs: numbers that go in.
        outputs: numbers that come out.
        count: how many there are in the model.
    """

    name: str
    inputs: int
    outputs: int
    count: int


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a causal LM.

    Attributes:
        parameters: all of them, tied ones once.
        layers: decoder layers.
        layer_parameters: of the largest decoder layer.
        head_parameters: V x D.
        tied: head and embedding share their weights.
        linears: the linear layers within the decoder layers.
        hidden: D.
        heads: of the queries.
        vocab: V.
        kept_layer: bytes a token that a layer keeps for the backward pass, attention probabilities apart.
        kept_rest: bytes a token that is kept outside of the layers.
    """

    parameters: int
    layers: int
    layer_parameters: int
    head_parameters: int
    tied: bool
    linears: tuple[Linear, ...]
    hidden: int
    heads: int
    vocab: int
    kept_layer: float
    kept_rest: float

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers within the decoder layers: what is cast, and what can be quantised."""
        return sum(linear.inputs * linear.outputs * linear.count for linear in self.linears)

    @property
    def widest(self) -> int:
        """Numbers a token of a layer's widest activation."""
        return max([linear.outputs for linear in self.linears] + [linear.inputs for linear in self.linears])


def model_shape(config: PretrainedConfig, bf16: bool) -> ModelShape:
    """Measure a model without its weights.

    Args:
        config: a causal LM's.
        bf16: under bf16 autocast, else fp32.

    Raises:
        ConfigurationError: a model that doesn't run on tensors without values, as mixtures of experts.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)] or [model]
    found: Counter[tuple[str, int, int]] = Counter()
    for name, module in (pair for layer in layers for pair in layer.named_modules()):
        if isinstance(module, nn.Linear | Conv1D):
            sizes = module.weight.shape if isinstance(module, Conv1D) else reversed(module.weight.shape)
            found[name.rsplit(".", 1)[-1], *sizes] += 1
    text, head = config.get_text_config(), model.get_output_embeddings()
    try:
        kept_layer, kept_rest = _kept(config, bf16)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigurationError(
            f"`model.model_name_or_path`: what a {text.model_type} keeps a token can't be counted without its weights "
            f"({str(error).splitlines()[0]}); there is no estimate for it"
        ) from error
    return ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        layers=len(layers),
        layer_parameters=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
        head_parameters=head.weight.numel(),
        tied=head.weight is model.get_input_embeddings().weight,
        linears=tuple(Linear(*key, count) for key, count in found.items()),
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        vocab=head.weight.shape[0],
        kept_layer=kept_layer,
        kept_rest=kept_rest,
    )


class _Attention(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`[B, H, L, E]` of query and `[B, K, L, E]` of key and value to `[B, H, L, E]` without values."""
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (t.bfloat16() for t in (query, key, value))
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None


def _kept(config: PretrainedConfig, bf16: bool) -> tuple[float, float]:
    """Bytes a token that a layer keeps, and those outside of the layers.

    Slopes between two lengths: copies of weights, which are the same for both, drop out.
    """
    AttentionInterface.register(_TRACE, _attention)
    AttentionMaskInterface.register(_TRACE, lambda *args, **kwargs: None)
    short, long = _TRACE_TOKENS
    slopes = [(_saved(config, n, long, bf16) - _saved(config, n, short, bf16)) / (long - short) for n in (1, 2)]
    return slopes[1] - slopes[0], 2 * slopes[0] - slopes[1]


def _saved(config: PretrainedConfig, layers: int, tokens: int, bf16: bool) -> int:
    """Bytes of all tensors that a forward pass of the first layers keeps, weights excepted."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if text.to_dict().get("layer_types"):
        text.layer_types = text.layer_types[:layers]
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=_TRACE).train()
        share_input_casts(model)
        keep_less_in_norms(model)
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        ids, positions = torch.zeros(1, tokens, dtype=torch.long), torch.arange(tokens)[None]
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16, cache_enabled=False)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            out = model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
            keep(out)
        return sum(storage.nbytes() for key, storage in kept.items() if key not in weights)
