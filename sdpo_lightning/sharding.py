"""Rank 1: FSDP2 for one model: which parts are gathered together, filled from rank 0, copied shard to shard.

Policy and reference are cut by the same settings, so that each rank holds the same part of both and a stage swap
moves no byte between ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, empty

# `old, new`: writes the values of a weight into its new place; `old` is whole, or on the meta device.
Fill = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Sharding:
    """How a model is cut over the ranks.

    Attributes:
        mesh: one dimension (shard), or two (replicate, shard).
        device: of the shards.
        param_dtype: of gathered weights and of the compute; the shards stay fp32. None: fp32.
    """

    mesh: DeviceMesh
    device: torch.device
    param_dtype: torch.dtype | None = None

    def shard_(
        self,
        root: nn.Module,
        layers: Sequence[nn.Module],
        fill_: Fill,
        offload: bool = False,
    ) -> None:
        """Cut a model in place, one group of weights after the other: only one is ever whole beyond its source.

        Args:
            root: the model; its weights outside of `layers` form the last group.
            layers: its repeated blocks, each a group.
            fill_: writes the values of each weight.
            offload: keep the shards in the memory of the CPU between forward passes.
        """
        policy = MixedPrecisionPolicy(self.param_dtype, torch.float32 if self.param_dtype else None)
        parked = offload and self.device.type != "cpu"
        for group in (*layers, root):
            materialise_(group, root, self.device, fill_)
            # Explicitly: after a forward without gradients the root would stay whole, and a copy go to the wrong place.
            fully_shard(
                group,
                mesh=self.mesh,
                reshard_after_forward=True,
                mp_policy=policy,
                offload_policy=CPUOffloadPolicy() if parked else OffloadPolicy(),
            )

    def on_cpu(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor without values, cut as a weight of that shape is, with this rank's part in the memory of the CPU."""
        replicas = (Replicate(),) * (self.mesh.ndim - 1)
        cut = empty(shape, dtype=dtype, device_mesh=self.mesh, placements=(*replicas, Shard(0)))
        return cut.to("cpu")


def is_sharded(module: nn.Module) -> bool:
    """Whether a module was cut by `shard_`."""
    return isinstance(module, FSDPModule)


@torch.no_grad()
def materialise_(group: nn.Module, root: nn.Module, device: torch.device, fill_: Fill) -> None:
    """Put the weights of a part of a model on the device, one at a time; what is cut already stays.

    Args:
        group: `root` or a part of it.
        root: the model; tied weights stay tied.
        device: of the new weights.
        fill_: writes the values of each.
    """
    holders = _holders(root)
    for parameter in list(group.parameters()):
        if isinstance(parameter, DTensor):
            continue
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        fill_(parameter, whole)
        placed = nn.Parameter(whole, parameter.requires_grad)
        for module, name in holders[id(parameter)]:
            module.register_parameter(name, placed)


def fill_from_first_rank(old: Tensor, new: Tensor) -> None:
    """Values come from rank 0."""
    if dist.get_rank() == 0:
        new.copy_(old)
    dist.broadcast(new, src=0)


def leave_empty(old: Tensor, new: Tensor) -> None:
    """Values are written later."""


@contextmanager
def weights_on_meta() -> Iterator[None]:
    """Models made within have weights without values and without memory, but real buffers."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        # One that is there already is being tied.
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def reshard_(model: nn.Module) -> None:
    """Have the parameters be shards: a whole one may be lying about since the last forward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def own_part(tensor: Tensor) -> Tensor:
    """This rank's shard, or the tensor itself where it isn't cut; they share their memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_pairs(target: nn.Module, source: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """This rank's shards of two models that are cut alike, weight by weight, to be written into.

    Args:
        target: whose shards come first.
        source: of the same names and shapes.
    """
    for model in (target, source):
        # What is written into a whole weight would be lost.
        reshard_(model)
    theirs, ours = dict(source.named_parameters()), dict(target.named_parameters())
    assert ours.keys() == theirs.keys(), "policy and reference are not the same architecture"
    for name, mine in ours.items():
        other = theirs[name]
        assert isinstance(mine, DTensor) and isinstance(other, DTensor), f"{name} is not sharded"
        assert mine.placements == other.placements and mine.device_mesh == other.device_mesh, f"{name} is cut otherwise"
    return [(_local(mine), _local(theirs[name])) for name, mine in ours.items()]


@torch.no_grad()
def copy_shards_(target: nn.Module, source: nn.Module) -> None:
    """Copy each shard of `source` into the same shard of `target`. Nothing goes between ranks.

    Args:
        target: cut as `source` is.
        source: with the values.
    """
    ours, theirs = zip(*shard_pairs(target, source), strict=True)
    torch._foreach_copy_(ours, theirs)
    buffers = dict(source.named_buffers())
    for name, buffer in target.named_buffers():
        buffer.copy_(buffers[name])


def _local(shard: Tensor) -> Tensor:
    assert isinstance(shard, DTensor)
    return shard.to_local()


def whole_tensors(named: Sequence[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor whole and on the CPU, one at a time; what is sharded, on ranks other than 0, on the meta device.

    Args:
        named: the same on every rank; shards or plain tensors.
    """
    for name, tensor in named:
        tensor = tensor.detach()
        if not isinstance(tensor, DTensor):
            yield name, tensor if tensor.is_meta else tensor.cpu()
            continue
        # Parked shards travel by way of the device.
        device = tensor.device_mesh.device_type
        moved = tensor if tensor.device.type == device else tensor.to(device)
        assert isinstance(moved, DTensor)
        whole = moved.full_tensor()
        yield name, whole.cpu() if dist.get_rank() == 0 else whole.to("meta")


def _holders(root: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Id of a weight -> where it is kept; tied ones in several places."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in root.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(id(parameter), []).append((module, name))
    return found
