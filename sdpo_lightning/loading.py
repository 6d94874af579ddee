"""Rank 3: one model on all ranks, read once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from sdpo_lightning.backbone import CausalBackbone
from sdpo_lightning.memory import keep_freed_memory
from sdpo_lightning.ranks import from_first_rank
from sdpo_lightning.sharding import Sharding
from sdpo_lightning.types import ConfigurationError


def load_on_ranks(
    load: Callable[[], CausalBackbone],
    load_skeleton: Callable[[], CausalBackbone],
    device: torch.device,
    sharding: Sharding | None,
) -> CausalBackbone:
    """Read a model on rank 0 and give every rank its part. A collective.

    The memory of a node holds one copy at most, and that shrinks as its weights are sent.

    Args:
        load: reads it; called on rank 0.
        load_skeleton: the same model with weights on the meta device; called on every rank, and may be a collective.
        device: of this rank.
        sharding: how to cut it; None gives each rank the whole model.

    Returns:
        The model; without other ranks and uncut just as it was read, else on the device.

    Raises:
        ConfigurationError: the two aren't the same model.
    """
    keep_freed_memory()
    if sharding is None and (not dist.is_initialized() or dist.get_world_size() == 1):
        return load()
    skeleton = load_skeleton()
    held = [skeleton]
    expected = from_first_rank(lambda: _read(held, load))
    found = _shapes(skeleton)
    if found != expected:
        name = min(found.items() ^ expected.items())[0]
        raise ConfigurationError(
            f"`load_skeleton` doesn't make the model of `load_weights`: {name} is another; override both"
        )
    del skeleton
    placed = held.pop().place_(device, sharding)
    placed.base_digest = from_first_rank(lambda: placed.base_digest)
    return placed


def store_frozen_(backbone: CausalBackbone, dtype: torch.dtype | None) -> CausalBackbone:
    """Hold the frozen weights of linear layers in the dtype that autocast gives them anyway: the same products.

    Args:
        backbone: with adapters.
        dtype: of the products; None leaves the weights alone.
    """
    if dtype is None:
        return backbone
    # The embedding of a tied head: autocast leaves it alone.
    embedding = backbone.model.get_input_embeddings().weight
    for name, module in backbone.model.named_modules():
        plain = type(module) is nn.Linear and ".lora_" not in name
        if plain and not module.weight.requires_grad and module.weight is not embedding:
            module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
    return backbone


def _read(held: list[CausalBackbone], load: Callable[[], CausalBackbone]) -> dict[str, str]:
    held[0] = load()
    return _shapes(held[0])


def _shapes(backbone: CausalBackbone) -> dict[str, str]:
    """What has to be alike on all ranks: they send and reduce these tensors one by one."""
    held = {n: f"{tuple(p.shape)} {p.dtype} {p.requires_grad}" for n, p in backbone.named_parameters()}
    return held | {n: f"{tuple(b.shape)} {b.dtype}" for n, b in backbone.named_buffers()}
