"""Rank 3: one model on all ranks, read once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from sdpo_lightning.backbone import CausalBackbone
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


def _read(held: list[CausalBackbone], load: Callable[[], CausalBackbone]) -> dict[str, tuple[int, ...]]:
    held[0] = load()
    return _shapes(held[0])


def _shapes(backbone: CausalBackbone) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in backbone.named_parameters()}
