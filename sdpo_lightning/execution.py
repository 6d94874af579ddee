"""Rank 3: how a model is run, for the same numbers: activations recomputed or offloaded, layers compiled, Liger."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from sdpo_lightning.backbone import CausalBackbone
from sdpo_lightning.types import ConfigurationError


@dataclass(frozen=True)
class Execution:
    """Settings that trade time for memory and change no result beyond rounding.

    Attributes:
        gradient_checkpointing: recompute activations in the backward pass: of every layer (True), of every n-th (n).
        offload_activations: hold what the layers keep for the backward pass in the memory of the CPU.
        compile_layers: `torch.compile` each decoder layer.
        liger: Liger's Triton kernels for norms, MLP and rotary embedding (CUDA only; the `[liger]` extra).

    Raises:
        ConfigurationError: a negative n, or offloading without recomputation.
    """

    gradient_checkpointing: bool | int = False
    offload_activations: bool = False
    compile_layers: bool = False
    liger: bool = False

    def __post_init__(self) -> None:
        if self.gradient_checkpointing < 0:
            raise ConfigurationError(
                f"`model.gradient_checkpointing` is {self.gradient_checkpointing}, expected true, false or n "
                "for every n-th layer"
            )
        if self.offload_activations and int(self.gradient_checkpointing) != 1:
            raise ConfigurationError(
                "`model.offload_activations` moves what is kept between layers; set "
                "`model.gradient_checkpointing` to true"
            )

    def apply(self, backbone: CausalBackbone) -> CausalBackbone:
        """Set a model up in place, before it is moved or sharded.

        Args:
            backbone: with its weights.

        Raises:
            ConfigurationError: the model, the machine or the installation can't do it.
        """
        if self.liger:
            _apply_liger(backbone)
        if self.gradient_checkpointing:
            _checkpoint(backbone, int(self.gradient_checkpointing))
        backbone.offloads_activations = self.offload_activations
        if self.compile_layers:
            backbone.compile_layers()
        return backbone


def _checkpoint(backbone: CausalBackbone, every: int) -> None:
    layers = backbone.decoder_layers()
    backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    for number, layer in enumerate(layers):
        assert isinstance(layer, GradientCheckpointingLayer)
        layer.gradient_checkpointing = number % every == 0


def _apply_liger(backbone: CausalBackbone) -> None:
    if not torch.cuda.is_available():
        raise ConfigurationError("`model.liger` needs a CUDA GPU, and there is none; leave it out")
    # Only here: it imports what is installed of PEFT and bitsandbytes, which takes seconds.
    from transformers.integrations.liger import apply_liger_kernel

    # Our own head does what Liger's losses do.
    kernels = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    try:
        apply_liger_kernel(backbone.model, kernels)
    except ImportError as error:
        raise ConfigurationError(
            "`model.liger` needs liger-kernel 0.7 or newer: pip install 'sdpo-lightning[liger]'"
        ) from error
