"""Runs of two ranks that `torchrun` has started: `reference_script.py OUT MODEL OTHER`."""

from __future__ import annotations

import sys
from pathlib import Path

from runs import fit

from sdpo_lightning import (
    CachedExternalReference,
    CachedFixedReference,
    ExternalReference,
    FixedAdapterReference,
    FixedReference,
    KLBoundReference,
    LoraSettings,
    PreferenceSource,
    UpdatingReference,
)
from sdpo_lightning.ranks import leave_group

LORA = {"lora": LoraSettings(r=4)}
SFT = {"policy_starts_at": "sft"}


def scenarios(model: str, other: str) -> dict:
    """Name -> strategy, what makes the reference, settings of the module."""
    return {
        "fixed": ("fsdp2", FixedReference, SFT),
        "fixed-cached": ("fsdp2", CachedFixedReference, {}),
        "fixed-adapter": ("fsdp2", FixedAdapterReference, LORA | SFT),
        "external": ("fsdp2", lambda: ExternalReference(other), {}),
        "external-own-tokens": ("fsdp2", lambda: CachedExternalReference(other, other), {}),
        "external-ddp": ("ddp", lambda: CachedExternalReference(other, other), {}),
        "soft": ("ddp", lambda: UpdatingReference(1, 0.3), {}),
        # One step passes this bound and the next one doesn't, as on one process.
        "bound": ("ddp", lambda: KLBoundReference(1e-3), {}),
    }


def sources(out: Path) -> list[PreferenceSource]:
    """Two files of an even number of pairs, so that two ranks see what one process does."""
    return [PreferenceSource(name, str(out / f"{name}.jsonl")) for name in "ab"]


if __name__ == "__main__":
    out, model, other = Path(sys.argv[1]), *sys.argv[2:]
    for name, (strategy, make, module_args) in scenarios(model, other).items():
        arguments = {"devices": 2, "strategy": strategy}
        data = {"batch_size": 1, "val_fraction": 0.2}
        fit(out / name, model, sources(out), None, make(), trainer_args=arguments, module_args=module_args, **data)
    leave_group()
