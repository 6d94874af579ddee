"""Rank 4: `trainer.strategy: fsdp2`, Lightning's ModelParallelStrategy set up for this package.

Importing this file registers two names: `fsdp2` cuts the weights over all ranks, `fsdp2_hybrid` over the ranks of a
node and repeats that on every node.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from sdpo_lightning.adapters import check_checkpoint
from sdpo_lightning.checkpoint_files import META, begin_shards, remove_checkpoint, save_shards_atomically
from sdpo_lightning.checkpoint_writes import BackgroundWrites, storages
from sdpo_lightning.plain_shards import PlainPlanner, check_shards
from sdpo_lightning.ranks import from_every_rank, from_first_rank
from sdpo_lightning.sharding import Sharding
from sdpo_lightning.types import ConfigurationError, ResumeError


class ShardedPrecision(Precision):
    """`bf16-mixed` under sharding: fp32 shards, weights gathered and computed in bf16, gradients reduced in fp32.

    No autocast: it would gather fp32 and keep a second, whole copy.
    """

    precision: Literal["bf16-mixed"] = "bf16-mixed"

    def forward_context(self) -> AbstractContextManager[None]:
        """Nothing: the gathered weights are bf16 already."""
        return nullcontext()


class FSDP2Strategy(ModelParallelStrategy):
    """Policy, reference, gradients and optimizer states cut over the ranks (torch's `fully_shard`).

    Args:
        replicas: groups of ranks that each hold all shards (HSDP); `nodes` makes each node such a group.
    """

    def __init__(self, replicas: int | Literal["nodes"] = 1) -> None:
        super().__init__()
        self._replicas = replicas
        self._sharding: Sharding | None = None
        self._restoring: Path | None = None

    @property
    def sharding(self) -> Sharding:
        """How models are cut; known once the processes have met."""
        assert self._sharding is not None, "the processes haven't met yet"
        return self._sharding

    @property
    def precision_plugin(self) -> Precision:
        """Lightning's, without autocast."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        """Set by the Trainer."""
        mixed = isinstance(precision_plugin, MixedPrecision) and precision_plugin.precision == "bf16-mixed"
        self._precision_plugin = ShardedPrecision() if mixed else precision_plugin

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """As every other strategy here: the plan is restored before it is asked for."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning says when; `load_optimizer_state_dict` does it."""
        return True

    def setup_environment(self) -> None:
        """Meet the other processes and lay out the mesh.

        Raises:
            ConfigurationError: the ranks don't divide into so many replicas.
        """
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()
        replicas = self.num_nodes if self._replicas == "nodes" else self._replicas
        if replicas < 1 or self.world_size % replicas:
            raise ConfigurationError(
                f"`trainer.strategy`: {self.world_size} ranks don't divide into {replicas} replicas; change `replicas`"
            )
        device = self.root_device
        shape: tuple[int, ...] = (self.world_size,)
        names: tuple[str, ...] = ("shard",)
        if replicas > 1:
            shape, names = ((replicas, self.world_size // replicas), ("replicate", "shard"))
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        mixed = isinstance(self.precision_plugin, ShardedPrecision)
        self._sharding = Sharding(mesh, device, torch.bfloat16 if mixed else None)

    # ---- distributed checkpoints: a folder, each rank's shards and what rank 0 says

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a folder that appears whole or not at all. A collective.

        Args:
            checkpoint: what Lightning has collected.
            filepath: of the folder.
            storage_options: `BackgroundWrites`; None returns when all is on the disk.

        Raises:
            OSError: it can't be written, on all ranks; those written in the background raise it when they are settled.
        """
        path = Path(self.broadcast(filepath))
        from_first_rank(lambda: begin_shards(path))
        shards = {"state_dict": checkpoint.pop("state_dict")}
        shards |= {f"optimizer_{n}": state for n, state in enumerate(checkpoint.pop("optimizer_states", []))}
        shards |= {"reference": _take_shards_(checkpoint)}
        # Now, whole: it isn't large, and parts of it change with the next step.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        rest = buffer.getvalue()
        if isinstance(storage_options, BackgroundWrites):
            live = self._live_storages() | storages(shards["reference"].values())
            held, group = storage_options.hold(shards, live), storage_options.group()
            storage_options.begin(lambda: save_shards_atomically(held, rest, path, group))
            return
        error = None
        try:
            save_shards_atomically(shards, rest, path)
        except OSError as failed:
            error = failed
        for found in from_every_rank(error):
            if found is not None:
                raise found

    def _live_storages(self) -> set[int]:
        """What a step writes into; Lightning has copied the rest from the device already."""
        states = (state for optimizer in self.optimizers for state in optimizer.state.values())
        values = (value for state in states for value in state.values() if isinstance(value, torch.Tensor))
        assert self.model is not None
        return storages((*self.model.state_dict().values(), *values))

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Delete a folder and its digest."""
        if self.is_global_zero:
            remove_checkpoint(Path(filepath))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the model's shards, on however many ranks they were written; the optimizer's follow later.

        Raises:
            ResumeError: it isn't such a folder.
        """
        path = Path(self.broadcast(checkpoint_path))
        if not (path / META).is_file():
            raise ResumeError(
                f"`ckpt_path`: {path} is no distributed checkpoint; a run keeps its `trainer.strategy` when it goes on"
            )
        metadata = torch.load(path / META, map_location="cpu", weights_only=True)
        check_shards(path)
        held = FileSystemReader(path).read_metadata().state_dict_metadata
        # A DPOLitModule, which stands in a rank above.
        module: Any = self.lightning_module
        assert self.model is not None
        names = [n.removeprefix("state_dict.") for n in held if n.startswith("state_dict.")]
        # Before any tensor is read: other adapters have other shapes.
        check_checkpoint(metadata | {"state_dict": names}, module.policy, module.lora, module.quantization)
        # Frozen weights are not in it.
        weights = {n: w for n, w in get_model_state_dict(self.model).items() if f"state_dict.{n}" in held}
        reference = self._empty_shards("reference.", held)
        state: dict[str, Any] = {"state_dict": weights, "reference": reference}
        load(state, checkpoint_id=path, planner=PlainPlanner())
        strict = module.strict_loading
        set_model_state_dict(self.model, state["state_dict"], options=StateDictOptions(strict=strict))
        self._restoring = path
        # Beside what isn't a shard of it.
        state["reference"] = reference | metadata.get("reference", {})
        return metadata | state | {"optimizer_states": []}

    def _empty_shards(self, prefix: str, held: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Name -> a place for this rank's part of it, for each tensor of a checkpoint whose name begins so."""
        found = {name.removeprefix(prefix): about for name, about in held.items() if name.startswith(prefix)}
        return {name: self.sharding.on_cpu(about.size, about.properties.dtype) for name, about in found.items()}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Read the optimizer's shards of the checkpoint that `load_checkpoint` has opened."""
        assert self._restoring is not None and self.model is not None, "no checkpoint is open"
        for number, optimizer in enumerate(self.optimizers):
            state = {f"optimizer_{number}": get_optimizer_state_dict(self.model, optimizer)}
            load(state, checkpoint_id=self._restoring, planner=PlainPlanner())
            set_optimizer_state_dict(self.model, optimizer, state[f"optimizer_{number}"])


def _take_shards_(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Take the shards of a reference that has moved out of what rank 0 says."""
    state = checkpoint.get("reference", {})
    shards: dict[str, torch.Tensor] = {name: tensor for name, tensor in state.items() if isinstance(tensor, DTensor)}
    checkpoint["reference"] = {name: tensor for name, tensor in state.items() if name not in shards}
    return shards


def sharding_of(strategy: Any) -> Sharding | None:
    """How a Trainer's strategy cuts models; None where each rank holds them whole."""
    return strategy.sharding if isinstance(strategy, FSDP2Strategy) else None


for _name, _given in (("fsdp2", 1), ("fsdp2_hybrid", "nodes")):
    StrategyRegistry.register(
        _name, FSDP2Strategy, description="FSDP2 of policy and reference", override=True, replicas=_given
    )
