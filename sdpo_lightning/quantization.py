"""Rank 1: frozen weights that are quantised while they load; their layers compute alike in training and in eval mode.

NF4: arXiv 2305.14314; int8: arXiv 2208.07339.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from sdpo_lightning.types import QuantizationName

# Says at every product that its inputs are rounded.
_INT8_LOG = "bitsandbytes.autograd._functions"


def quantization_config(name: QuantizationName) -> BitsAndBytesConfig:
    """How transformers quantises the linear layers while it loads them; the head and the norms stay fp32.

    Args:
        name: `nf4` (with the scales quantised again, as in QLoRA) or `int8`.
    """
    if name == "int8":
        logging.getLogger(_INT8_LOG).setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def same_kernels_in_eval(model: nn.Module) -> None:
    """Have quantised layers compute in eval mode as they do in training, where on a CPU bitsandbytes would not.

    Its 4-bit layers may change to a layout that computes in bf16 and passes no gradient on, also in later training
    mode; its int8 layers round their inputs in eval mode only.
    """
    for module in model.modules():
        kind = type(module).__name__
        if kind == "Linear4bit":
            # Of bitsandbytes, which isn't imported for its types.
            layer: Any = module
            layer.support_avx512bf16_for_cpu = False
            module.register_forward_pre_hook(_in_dtype_of_autocast)
        elif kind == "Linear8bitLt":
            module.register_forward_pre_hook(_as_in_training)


def _in_dtype_of_autocast(module: Any, inputs: tuple[Tensor, ...]) -> None:
    # Else in that of its first forward, which may lie outside of autocast.
    device = inputs[0].device.type
    autocast = torch.is_autocast_enabled(device)
    module.compute_dtype = torch.get_autocast_dtype(device) if autocast else inputs[0].dtype


def _as_in_training(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    module.training = True
