"""Rank 5: `BestOfStage`: the weights of a stage that are best by a held-out metric become M_t."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sdpo_lightning.files import cannot_write, publish
from sdpo_lightning.ranks import from_first_rank, is_first
from sdpo_lightning.run_parts import run_dir, stage_module
from sdpo_lightning.stage_weights import StageWeights
from sdpo_lightning.stop_rule import HELD_OUT_LOSS, Mode, check_mode, is_better
from sdpo_lightning.strategy import sharding_of
from sdpo_lightning.types import ConfigurationError, ResumeError, Stage

log = logging.getLogger(__name__)

_FILE = "best.safetensors"


class BestOfStage(StageWeights):
    """The weights with the best value of a metric among the validations of the stage.

    They lie in one file of the run directory (`references/best.safetensors`), and in each checkpoint from within the
    stage, so that a run goes on from any of them; neither is kept in memory. With `model.lora` they are the adapter.
    Among equal values the first one counts.

    Args:
        monitor: name of a logged metric; with `{source}`, as in `StopRule`.
        mode: `min` if lower is better, `max` if higher is.

    Raises:
        ConfigurationError: another mode.
    """

    def __init__(self, monitor: str = HELD_OUT_LOSS, mode: Mode = "min") -> None:
        check_mode("`stage_weights` of StageTransition", mode)
        self.monitor: str = monitor
        self.mode: Mode = mode
        # Of the stage under way; nothing before its first finite value.
        self.step: int | None = None
        self.value: float | None = None
        self._path: Path | None = None
        self._loaded: dict[str, Tensor] = {}

    def settings(self) -> dict[str, Any]:
        """What is compared, and how."""
        return {"class": "BestOfStage", "monitor": self.monitor, "mode": self.mode}

    def check(self, trainer: pl.Trainer) -> None:
        """Refuse shards: no rank holds the weights to write.

        Raises:
            ConfigurationError: with what to use.
        """
        if sharding_of(trainer.strategy) is not None:
            raise ConfigurationError(
                f"`stage_weights` of StageTransition is BestOfStage with {type(trainer.strategy).__name__}, where no "
                "rank holds the weights to keep; use `trainer.strategy: ddp` or one device, or leave it out"
            )
        self._path = run_dir(trainer) / "references" / _FILE

    def begin_stage(self) -> None:
        """No validation so far."""
        self.step = self.value = None
        self._loaded = {}

    def after_validation(self, trainer: pl.Trainer, pl_module: pl.LightningModule, value: float | None) -> None:
        """Keep the policy where it is better than all before it."""
        assert value is not None, "there is a monitor"
        if not is_better(value, self.value, self.mode):
            return
        self.step, self.value = trainer.global_step, value
        weights = {name: p.detach() for name, p in _trained(pl_module)} if is_first() else {}
        from_first_rank(lambda: self._write(weights))

    def _write(self, weights: Mapping[str, Tensor]) -> None:
        assert self._path is not None, "`check` comes first"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        staging = self._path.with_name(f".{self._path.name}.tmp")
        try:
            save_file({name: t.cpu().contiguous() for name, t in weights.items()}, staging)
            publish(staging, self._path)
        except OSError as error:
            raise OSError(cannot_write(self._path, error)) from error

    @torch.no_grad()
    def choose_(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: Stage) -> None:
        """Go back to the best weights.

        Raises:
            ResumeError: their file is gone.
        """
        if self.step is None:
            log.warning("stage %d %r: %s was never finite; its last weights are kept", *_named(stage), self.monitor)
        elif self.step == trainer.global_step:
            log.info("stage %d %r: its last weights are its best (%s %.6g)", *_named(stage), self.monitor, self.value)
        else:
            from_first_rank(self._find)
            for name, parameter in _trained(pl_module):
                parameter.data.copy_(self._broadcast(name, parameter))
            text = "stage %d %r: back to the weights of step %d of %d (%s %.6g)"
            log.info(text, *_named(stage), self.step, trainer.global_step, self.monitor, self.value)
        self.begin_stage()
        if self._path is not None:
            from_first_rank(partial(self._path.unlink, missing_ok=True))

    def _find(self) -> None:
        assert self._path is not None, "`check` comes first"
        if not self._path.exists():
            raise ResumeError(f"{self._path} is gone; it held the best weights of the stage: go on from a checkpoint")

    def _broadcast(self, name: str, like: Tensor) -> Tensor:
        """One tensor of the file, which only rank 0 may see."""
        if is_first():
            with safe_open(str(self._path), framework="pt") as file:
                tensor = file.get_tensor(name).to(like.device)
        else:
            tensor = torch.empty_like(like)
        if dist.is_initialized():
            dist.broadcast(tensor, 0)
        return tensor

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Which weights, and on rank 0, which writes the checkpoint, the weights: read from the file as it is saved."""
        if self.step is None or self._path is None:
            return {}
        weights = self._loaded
        if not weights and is_first():
            with safe_open(str(self._path), framework="pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return {"step": self.step, "value": self.value, "weights": weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what a checkpoint holds."""
        self.begin_stage()
        if state:
            self.step, self.value, self._loaded = state["step"], state["value"], dict(state["weights"])

    def go_on(self, trainer: pl.Trainer) -> None:
        """Write the checkpoint's best weights over those that an interrupted run may have left."""
        loaded, self._loaded = self._loaded, {}
        if self.step is not None:
            from_first_rank(lambda: self._write(loaded))


def _trained(pl_module: pl.LightningModule) -> list[tuple[str, nn.Parameter]]:
    policy = stage_module(pl_module).trained
    return [(name, p) for name, p in policy.named_parameters() if p.requires_grad]


def _named(stage: Stage) -> tuple[int, str]:
    return stage.index, stage.name
