"""Rank 2: a causal LM as one module from ids to token logps; load, cut, copy and digest its weights."""

from __future__ import annotations

import copy
import hashlib
from contextlib import nullcontext
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sdpo_lightning.adapters import TRAINED, LoraSettings, adapter_state, add_adapters
from sdpo_lightning.attention import packed_rows, register_segment_attention, segment_arguments
from sdpo_lightning.casts import CASTS
from sdpo_lightning.logprobs import linear_token_logps, token_logps
from sdpo_lightning.offload import ParkedWeights, offload_activations
from sdpo_lightning.quantization import quantization_config, same_kernels_in_eval
from sdpo_lightning.ranks import from_first_rank
from sdpo_lightning.router import RouterLoss
from sdpo_lightning.savings import save_work
from sdpo_lightning.sharding import (
    Sharding,
    copy_shards_,
    fill_from_first_rank,
    is_sharded,
    leave_empty,
    materialise_,
    weights_on_meta,
    whole_tensors,
)
from sdpo_lightning.types import ConfigurationError, PreferenceBatch, QuantizationName


class CausalBackbone(nn.Module):
    """Backbone and head in one `forward`, so that sharding hooks gather the head's weight too.

    Args:
        model: a transformers causal LM.
        logits_budget_mb: most MiB of fp32 logits that exist at once.
    """

    def __init__(self, model: PreTrainedModel, logits_budget_mb: float = 256.0) -> None:
        super().__init__()
        self.model, self.logits_budget_mb = model, logits_budget_mb
        save_work(model)
        self.offloads_activations = self._compiles_layers = False
        # Not a module of this one: a tuple hides the blueprint.
        self._cut: tuple[Sharding, CausalBackbone] | None = None
        self._parked: ParkedWeights | None = None
        # Of a summed logp, relative; int8 products round by what else is in the batch.
        self.layout_tolerance = 1e-4
        # Of the frozen weights, where adapters are trained; hashed once.
        self.base_digest: str | None = None
        # Granite divides, Cohere multiplies, Gemma 2 caps its logits after the head.
        values = model.config.get_text_config().to_dict()
        self.logit_scale = float(values.get("logit_scale") or 1.0) / float(values.get("logits_scaling") or 1.0)
        self.logit_cap = float(values.get("final_logit_softcapping") or 0.0)
        self.router = RouterLoss(values)

    def forward(self, batch: PreferenceBatch, collisions: bool = False) -> Tensor:
        """Log-probabilities `[N]` (float32, nats) of the completion tokens, or `[2, N]`; see `linear_token_logps`."""
        offload = offload_activations() if self.offloads_activations and self.training else nullcontext()
        parked = self._parked.on(batch.input_ids.device) if self._parked is not None else nullcontext()
        with parked:
            with packed_rows(batch.segments is not None), CASTS.in_use(), offload:
                outputs = self.model.base_model(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    position_ids=batch.position_ids,
                    use_cache=False,
                    **segment_arguments(batch, leaves_out=not self._compiles_layers),
                    **self.router.arguments(),
                )
            self.router.keep(outputs.get("router_logits"), batch)
            return self._token_logps(outputs.last_hidden_state, batch, collisions)

    def _token_logps(self, hidden: Tensor, batch: PreferenceBatch, collisions: bool) -> Tensor:
        head = self.model.get_output_embeddings()
        if type(head) is nn.Linear and not self.logit_cap:
            return linear_token_logps(hidden, batch, head, self.logit_scale, self.logits_budget_mb, collisions)
        vocab_size = self.model.config.get_text_config().vocab_size
        return token_logps(hidden, batch, self.logits, vocab_size, self.logits_budget_mb, collisions)

    def decoder_layers(self) -> list[nn.Module]:
        """The repeated blocks of the model, in order.

        Raises:
            ConfigurationError: it has none that is marked as such.
        """
        layers: list[nn.Module] = [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if not layers:
            raise ConfigurationError(
                f"{type(self.model).__name__} has no decoder layers that can be recomputed or compiled; leave "
                "`model.gradient_checkpointing` and `model.compile_layers` out"
            )
        return layers

    def compile_layers(self) -> None:
        """Compile each decoder layer in place; the names of the weights stay."""
        for layer in self.decoder_layers():
            # Lengths differ from batch to batch.
            layer.compile(dynamic=True)
        self._compiles_layers = True

    def place_(self, device: torch.device, sharding: Sharding | None) -> CausalBackbone:
        """Put the weights of rank 0 on the devices of all ranks, whole or cut, one at a time. A collective.

        Args:
            device: of this rank.
            sharding: how to cut; None gives each rank the whole model.
        """
        # On all ranks, because rank 0's may come from a file.
        buffers = [buffer.to(device) for buffer in self.buffers()]
        for buffer in buffers:
            dist.broadcast(buffer, src=0)
        for buffer, moved in zip(self.buffers(), buffers, strict=True):
            buffer.data = moved
        if sharding is None:
            materialise_(self, self, device, fill_from_first_rank)
            return self
        blueprint = self._without_values()
        sharding.shard_(self, self.decoder_layers(), fill_from_first_rank)
        self._cut = (sharding, blueprint)
        return self

    def _without_values(self) -> CausalBackbone:
        """A copy with weights on the meta device."""
        metas = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in self.parameters()}
        return copy.deepcopy(self, metas)

    def frozen_copy(self, offload: bool = False) -> CausalBackbone:
        """A copy that runs the same kernels and takes no gradients, cut as this one is.

        Args:
            offload: keep its weights in the memory of the CPU between forward passes.
        """
        if self._cut is None:
            twin = copy.deepcopy(self).requires_grad_(False)
            twin = twin.parked() if offload else twin
        else:
            sharding, blueprint = self._cut
            twin = copy.deepcopy(blueprint).requires_grad_(False)
            sharding.shard_(twin, twin.decoder_layers(), leave_empty, offload)
            twin._cut = self._cut
            copy_weights_(twin, self)
        if self._compiles_layers:
            # A copy of a compiled module isn't compiled.
            twin.compile_layers()
        return twin

    def parked(self) -> CausalBackbone:
        """This frozen model, or where it is cut a copy, with weights that wait in the memory of the CPU."""
        if self._cut is not None:
            return self.frozen_copy(offload=True)
        self._parked = ParkedWeights(self)
        return self

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states `[n, D]` -> logits `[n, V]`."""
        logits = self.model.get_output_embeddings()(hidden)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.logit_cap:
            logits = self.logit_cap * torch.tanh(logits / self.logit_cap)
        return logits


def load_policy(
    model_name_or_path: str,
    disable_dropout: bool = True,
    logits_budget_mb: float = 256.0,
    quantization: QuantizationName | None = None,
    allow_bin_weights: bool = False,
) -> CausalBackbone:
    """Load a causal LM with fp32 master weights, whatever the file's dtype.

    Args:
        model_name_or_path: a Hugging Face folder or hub name with safetensors weights.
        disable_dropout: set every dropout probability to 0.
        logits_budget_mb: most MiB of fp32 logits that exist at once.
        quantization: of the linear layers, which then can't be trained; they are quantised on the default device.
        allow_bin_weights: where there are no safetensors, read pickled weights: tensors only, no code of theirs runs.

    Raises:
        ConfigurationError: the model can't be read.
    """
    config = _read_config(model_name_or_path, disable_dropout)

    def read(use_safetensors: bool) -> tuple[PreTrainedModel, dict[str, Any]]:
        pair: Any = AutoModelForCausalLM.from_pretrained(
            model_name_or_path,
            config=config,
            dtype=torch.float32,
            use_safetensors=use_safetensors,
            weights_only=True,
            trust_remote_code=False,
            attn_implementation=_attention_of(config),
            output_loading_info=True,
            quantization_config=quantization and quantization_config(quantization),
            # Else a quantised model goes to the GPU, whatever the Trainer's device.
            device_map=quantization and {"": torch.get_default_device()},
        )
        return pair

    try:
        try:
            model, loading = read(True)
        except OSError:
            if not allow_bin_weights:
                raise
            model, loading = read(False)
    except UnpicklingError as error:
        held = "holds more than tensors, which might be code, and none of it was run; convert it to safetensors"
        raise ConfigurationError(f"`model.model_name_or_path`: {model_name_or_path!r} {held}") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise _no_model(model_name_or_path, error) from error
    absent = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if absent:
        raise ConfigurationError(
            f"`model.model_name_or_path`: {model_name_or_path!r} lacks {len(absent)} of the model's weights, "
            f"{absent[0]} first; they would be random"
        )
    same_kernels_in_eval(model)
    backbone = CausalBackbone(model, logits_budget_mb)
    if quantization == "int8":
        backbone.layout_tolerance = 1e-2
    return backbone


def attach_adapters(backbone: CausalBackbone, settings: LoraSettings, base: str) -> CausalBackbone:
    """Freeze a model and give it adapters to train, in place.

    Args:
        backbone: with its weights.
        settings: of the adapters.
        base: name or folder of the model, noted in exports.

    Raises:
        ConfigurationError: the settings don't fit the model.
    """
    backbone.base_digest = state_digest(backbone)
    add_adapters(backbone.model, settings, base)
    return backbone


def load_skeleton(
    model_name_or_path: str, disable_dropout: bool = True, logits_budget_mb: float = 256.0
) -> CausalBackbone:
    """The model that `load_policy` gives, with weights that have neither values nor memory.

    Args:
        model_name_or_path: a Hugging Face folder or hub name; only rank 0 reads it. A collective.
        disable_dropout: set every dropout probability to 0.
        logits_budget_mb: most MiB of fp32 logits that exist at once.

    Raises:
        ConfigurationError: its config can't be read.
    """
    config = from_first_rank(lambda: _read_config(model_name_or_path, disable_dropout))
    with weights_on_meta():
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=_attention_of(config), trust_remote_code=False
        )
    return CausalBackbone(model.eval(), logits_budget_mb)


def _no_model(model_name_or_path: str, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"`model.model_name_or_path`: no causal LM with safetensors weights at {model_name_or_path!r}: "
        f"{str(error).splitlines()[0]} (`model.allow_bin_weights: true` also takes pytorch_model.bin)"
    )


def _read_config(model_name_or_path: str, disable_dropout: bool) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(model_name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _no_model(model_name_or_path, error) from error
    if disable_dropout:
        _zero_dropout(config)
    return config


def _attention_of(config: PretrainedConfig) -> str:
    # Only the eager attention caps its scores.
    capped = config.get_text_config().to_dict().get("attn_logit_softcapping")
    return "eager" if capped else register_segment_attention()


def _zero_dropout(config: PretrainedConfig) -> None:
    for key, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
            setattr(config, key, 0.0)


@torch.no_grad()
def copy_weights_(target: nn.Module, source: nn.Module) -> None:
    """Copy parameters and buffers of `source` into `target`, which has the same names and shapes.

    Sharded ones are copied shard to shard, without communication.
    """
    if is_sharded(target) or is_sharded(source):
        copy_shards_(target, source)
        return
    theirs = dict(source.named_parameters()) | dict(source.named_buffers())
    ours = dict(target.named_parameters()) | dict(target.named_buffers())
    assert ours.keys() == theirs.keys(), "policy and reference are not the same architecture"
    torch._foreach_copy_(list(ours.values()), [theirs[name] for name in ours])


def weights_digest(backbone: CausalBackbone) -> str:
    """sha256 over names, dtypes, shapes and bytes of all parameters, sorted by name; tied ones once.

    Taken over whole tensors: it doesn't depend on the number of ranks. A collective where the model is sharded.
    With adapters: of the trained one and the base's own digest, which never changes.
    """
    if backbone.base_digest is None:
        return _tensors_digest(dict(backbone.model.named_parameters()))
    return adapter_digest(backbone, TRAINED)


def state_digest(backbone: CausalBackbone) -> str:
    """Digest of all that a model's state holds: with the scales of quantised weights, which are no parameters."""
    state = {name: value for name, value in backbone.model.state_dict().items() if isinstance(value, Tensor)}
    return _tensors_digest(state)


def adapter_digest(backbone: CausalBackbone, adapter: str) -> str:
    """Digest of the model with one of its adapters: equal for both if they are equal."""
    assert backbone.base_digest is not None
    return _tensors_digest(adapter_state(backbone.model, adapter), backbone.base_digest)


def _tensors_digest(tensors: dict[str, Tensor], seed: str = "") -> str:
    digest = hashlib.sha256(seed.encode())
    for name, tensor in whole_tensors(sorted(tensors.items())):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        if not tensor.is_meta:
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    cut = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    return from_first_rank(digest.hexdigest) if cut else digest.hexdigest()
