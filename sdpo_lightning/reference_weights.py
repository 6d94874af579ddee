"""Rank 6: the weights that a reference is restored from, read and verified; what a checkpoint's run began with."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from sdpo_lightning.adapter_reference import model_digest
from sdpo_lightning.ranks import from_first_rank
from sdpo_lightning.reference import check_reference_digest
from sdpo_lightning.run_parts import StageModule
from sdpo_lightning.types import ConfigurationError, ResumeError, StageRecord


def recorded_weights(pl_module: StageModule, run_dir: Path) -> nn.Module:
    """Read the M_t that the record names as the reference, and verify it.

    Args:
        pl_module: has the record and reads models.
        run_dir: where the folders of the record lie.

    Returns:
        A model of its own; with adapters, the policy with its frozen adapter.

    Raises:
        ResumeError: the folder's digest isn't the recorded one.
    """
    index = pl_module.record.reference
    folder = pl_module.record.folders.get(index)
    path = pl_module.model_name_or_path if folder is None else str(run_dir / folder)
    if folder is not None and not from_first_rank((run_dir / folder).is_dir):
        raise ResumeError(f"reference M_{index} sha mismatch: {path} is gone; restore it or start a new run")
    try:
        weights = pl_module.read_model(None if folder is None else run_dir / folder)
    except (ConfigurationError, OSError, SafetensorError) as error:
        if folder is None:
            raise
        raise ResumeError(f"reference M_{index} sha mismatch: {path} is damaged ({error})") from error
    check_reference_digest(index, path, model_digest(weights), pl_module.record.digests[index])
    return weights


def check_beginning(own: StageRecord, saved: StageRecord) -> None:
    """Compare what this module has read with what a checkpoint's run began with.

    Args:
        own: S and an external reference, as far as they are read.
        saved: the checkpoint's.

    Raises:
        ResumeError: another S, or another external reference.
    """
    for index, key, name in ((0, "model_name_or_path", "S"), (-1, "reference", "the external reference")):
        found, began = own.digests.get(index), saved.digests.get(index)
        if found is not None and began is not None and found != began:
            raise ResumeError(
                f"`model.{key}`: {name} has sha {found[:12]}, the checkpoint's run began with {began[:12]}"
            )
