"""Rank 4: a run as callbacks see it: what our module has, and what Lightning's Trainer has without declaring it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from sdpo_lightning.adapters import LoraSettings
from sdpo_lightning.backbone import CausalBackbone
from sdpo_lightning.completion_logps import CompletionLogps
from sdpo_lightning.exactness import LayoutName
from sdpo_lightning.execution import Execution
from sdpo_lightning.metrics import PreferenceMetrics
from sdpo_lightning.objectives import PreferenceLoss
from sdpo_lightning.reference import ReferencePolicy
from sdpo_lightning.types import LogpTable, PairLogps, PreferenceBatch, QuantizationName, Stage, StageRecord


class AdapterValues(Protocol):
    """What adapters began with; an `adapter_reference.FirstAdapter` is one."""

    def write_(self, model: nn.Module, adapter: str) -> None:
        """Give an adapter of the model these values, in place."""


class ForkedFrom(Protocol):
    """The run that a new one goes on from; a `fork.Fork` is one."""

    @property
    def run(self) -> str:
        """Its directory, or a model folder."""

    @property
    def from_stage(self) -> int:
        """The first stage that the new run trains."""

    def check(self, own_dir: Path) -> None:
        """Look at it before anything is loaded."""


class StageModule(pl.LightningModule):
    """What callbacks and passes ask of the module; what it means is said where it is set, in `DPOLitModule`."""

    model_name_or_path: str
    policy: CausalBackbone | None
    reference: ReferencePolicy
    loss: PreferenceLoss | None
    logps: CompletionLogps
    lora: LoraSettings | None
    quantization: QuantizationName | None
    execution: Execution
    disable_dropout: bool
    logits_budget_mb: float
    policy_starts_at: str
    make_optimizer: OptimizerCallable
    exact_layout: LayoutName | None
    fork: ForkedFrom | None
    goes_on_from: str | None
    record: StageRecord
    first_adapter: AdapterValues | None
    random_states: Sequence[dict[str, Any]] | None
    resumed_plan: dict[str, Any]
    stage: Stage | None
    evaluated: Stage | None
    learning_rate: float
    grad_norm: float
    m0_logps: LogpTable | None
    last_logps: tuple[PairLogps, PairLogps] | None
    step_metrics: PreferenceMetrics

    @property
    def trained(self) -> CausalBackbone:
        """The policy, once its weights are there."""
        assert self.policy is not None, "`configure_model` loads it"
        return self.policy

    @property
    def stage_under_way(self) -> Stage:
        """The stage, once one has begun."""
        assert self.stage is not None, "no stage has begun"
        return self.stage

    def compute_logps(self, model: nn.Module, batch: PreferenceBatch) -> PairLogps:
        """See `DPOLitModule`."""
        raise NotImplementedError

    def preference_loss(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        """See `DPOLitModule`."""
        raise NotImplementedError

    def score(self, model: nn.Module, batch: PreferenceBatch) -> PairLogps:
        """See `DPOLitModule`."""
        raise NotImplementedError

    def load_weights(self, model_name_or_path: str) -> CausalBackbone:
        """See `DPOLitModule`."""
        raise NotImplementedError

    def load_skeleton(self, model_name_or_path: str) -> CausalBackbone:
        """See `DPOLitModule`."""
        raise NotImplementedError

    def load_model(self, path: str) -> CausalBackbone:
        """See `DPOLitModule`."""
        raise NotImplementedError

    def read_model(self, folder: Path | None) -> nn.Module:
        """See `DPOLitModule`."""
        raise NotImplementedError

    def load_reference_weights(self, run_dir: Path) -> nn.Module:
        """See `DPOLitModule`."""
        raise NotImplementedError

    def trainable(self) -> list[nn.Parameter]:
        """See `StageOptimization`."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """See `DPOLitModule`."""
        raise NotImplementedError


def stage_module(pl_module: pl.LightningModule | None) -> StageModule:
    """Our module, which Lightning hands out as one of its own."""
    assert isinstance(pl_module, StageModule), f"{type(pl_module).__name__} is no DPOLitModule"
    return pl_module


def run_dir(trainer: pl.Trainer) -> Path:
    """Where the run leaves its files."""
    return Path(trainer.default_root_dir)


def is_try(trainer: pl.Trainer) -> bool:
    """Whether `fast_dev_run` is on, in which nothing is written."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def log_interval(trainer: pl.Trainer) -> int:
    """`log_every_n_steps`, at least 1."""
    return max(1, int(trainer.log_every_n_steps))  # type: ignore[attr-defined]


def val_check_is_timed(trainer: pl.Trainer) -> bool:
    """Whether `val_check_interval` is a time; then Lightning sets no number of batches."""
    return trainer._val_check_time_interval is not None  # type: ignore[attr-defined]


def epochs_processed(trainer: pl.Trainer) -> int:
    """Passes that are over; a stop within the last one counts it too."""
    return int(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """All callbacks, the module's own among them."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]
