"""Stepwise DPO (sDPO, arXiv 2403.19270) for PyTorch Lightning."""

from __future__ import annotations

from importlib import import_module

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
