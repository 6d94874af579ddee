"""Stepwise DPO (sDPO, arXiv 2403.19270) for PyTorch Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # For type checkers; the same as `_HOMES`.
    from sdpo_lightning.adapter_reference import AdapterReference as AdapterReference
    from sdpo_lightning.adapters import LoraSettings as LoraSettings
    from sdpo_lightning.best_weights import BestOfStage as BestOfStage
    from sdpo_lightning.callbacks import StageTransition as StageTransition
    from sdpo_lightning.checkpoint import StageCheckpoint as StageCheckpoint
    from sdpo_lightning.checkpoint_writes import BackgroundWrites as BackgroundWrites
    from sdpo_lightning.data.datamodule import CurriculumDataModule as CurriculumDataModule
    from sdpo_lightning.data.declaration import PreferenceSource as PreferenceSource
    from sdpo_lightning.data.new_pairs import PairSource as PairSource
    from sdpo_lightning.data.new_pairs import SampledPairs as SampledPairs
    from sdpo_lightning.data.pacing import Pacing as Pacing
    from sdpo_lightning.data.pair_generators import PairGenerator as PairGenerator
    from sdpo_lightning.data.pair_generators import VLLMPairGenerator as VLLMPairGenerator
    from sdpo_lightning.data.partitions import Partition as Partition
    from sdpo_lightning.export import StageExport as StageExport
    from sdpo_lightning.external_reference import CachedExternalReference as CachedExternalReference
    from sdpo_lightning.external_reference import ExternalReference as ExternalReference
    from sdpo_lightning.fixed_reference import CachedFixedReference as CachedFixedReference
    from sdpo_lightning.fixed_reference import FixedAdapterReference as FixedAdapterReference
    from sdpo_lightning.fixed_reference import FixedReference as FixedReference
    from sdpo_lightning.fork import Fork as Fork
    from sdpo_lightning.likelihood import LikelihoodGuard as LikelihoodGuard
    from sdpo_lightning.module import DPOLitModule as DPOLitModule
    from sdpo_lightning.reference import CachedReference as CachedReference
    from sdpo_lightning.reference import ReferencePolicy as ReferencePolicy
    from sdpo_lightning.reference import ResidentReference as ResidentReference
    from sdpo_lightning.sample_statistics import SampleStatistics as SampleStatistics
    from sdpo_lightning.stage_losses import StageLosses as StageLosses
    from sdpo_lightning.stage_models import StageEvaluation as StageEvaluation
    from sdpo_lightning.stage_models import StageSamples as StageSamples
    from sdpo_lightning.stage_weights import StageWeights as StageWeights
    from sdpo_lightning.stop_rule import StopRule as StopRule
    from sdpo_lightning.strategy import FSDP2Strategy as FSDP2Strategy
    from sdpo_lightning.types import Chunk as Chunk
    from sdpo_lightning.types import PairLogps as PairLogps
    from sdpo_lightning.types import PreferenceBatch as PreferenceBatch
    from sdpo_lightning.types import Stage as Stage
    from sdpo_lightning.types import StageSettings as StageSettings
    from sdpo_lightning.updating_reference import KLBoundReference as KLBoundReference
    from sdpo_lightning.updating_reference import UpdatingReference as UpdatingReference

__version__ = "0.1.0"

_HOMES = {
    "DPOLitModule": "module",
    "CurriculumDataModule": "data.datamodule",
    "PreferenceSource": "data.declaration",
    "StageTransition": "callbacks",
    "StopRule": "stop_rule",
    "StageWeights": "stage_weights",
    "StageLosses": "stage_losses",
    "BestOfStage": "best_weights",
    "StageExport": "export",
    "StageCheckpoint": "checkpoint",
    "StageEvaluation": "stage_models",
    "StageSamples": "stage_models",
    "SampleStatistics": "sample_statistics",
    "LikelihoodGuard": "likelihood",
    "Fork": "fork",
    "BackgroundWrites": "checkpoint_writes",
    "FSDP2Strategy": "strategy",
    "ReferencePolicy": "reference",
    "ResidentReference": "reference",
    "CachedReference": "reference",
    "AdapterReference": "adapter_reference",
    "ExternalReference": "external_reference",
    "CachedExternalReference": "external_reference",
    "UpdatingReference": "updating_reference",
    "KLBoundReference": "updating_reference",
    "FixedReference": "fixed_reference",
    "CachedFixedReference": "fixed_reference",
    "FixedAdapterReference": "fixed_reference",
    "LoraSettings": "adapters",
    "PreferenceBatch": "types",
    "PairLogps": "types",
    "Partition": "data.partitions",
    "Pacing": "data.pacing",
    "PairSource": "data.new_pairs",
    "SampledPairs": "data.new_pairs",
    "PairGenerator": "data.pair_generators",
    "VLLMPairGenerator": "data.pair_generators",
    "Chunk": "types",
    "Stage": "types",
    "StageSettings": "types",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    # Lazy, so that `--help` and the bottom ranks don't pay for Lightning.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
