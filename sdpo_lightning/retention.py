"""Rank 3: which models of past stages stay on the disk."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError

import torch

from sdpo_lightning.ledger import Ledger

log = logging.getLogger(__name__)


def remove_models(run_dir: Path, keep_last: int, reference: int) -> list[str]:
    """Delete all but the last models of past stages; the ledger keeps their digests and notes that they are gone.

    What a run may yet read stays: the current reference, and that of every checkpoint.

    Args:
        run_dir: of the run.
        keep_last: models that stay.
        reference: index of the current one.

    Returns:
        The folders that were deleted.
    """
    ledger = Ledger.read(run_dir)
    if ledger is None:
        return []
    # What a fork adopted is its parent's.
    done = {stage.index: stage.output for stage in ledger.own_stages if stage.output is not None}
    needed = {reference, *list(done)[-keep_last:]}
    past = {index for index, output in done.items() if index not in needed and not output.removed}
    if past:
        past -= {index for folder in ledger.checkpoints for index in _references(run_dir / folder)}
    for stage in ledger.own_stages:
        if stage.index in past:
            stage.output = done[stage.index] = replace(done[stage.index], removed=True)
    if past:
        # First the note: a model that is there in spite of it is deleted below, now or next time.
        ledger.write(run_dir)
    gone = []
    for folder in [output.folder for output in done.values() if output.removed]:
        assert folder is not None, "only M_0 has none"
        for path in (run_dir / folder, run_dir / f"{folder}-merged"):
            if path.is_dir():
                shutil.rmtree(path)
                gone.append(path.name)
    return gone


def _references(folder: Path) -> list[int]:
    """Index of the reference of each checkpoint in a folder; only a few bytes of each are read."""
    found = []
    for path in folder.glob("*.ckpt"):
        file = path / "meta.pt" if path.is_dir() else path
        try:
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            found.append(content["stage_record"]["reference"])
        except (OSError, EOFError, RuntimeError, ValueError, KeyError, UnpicklingError):
            # No resume can use it either.
            log.warning("%s is damaged: no model is kept for it", path)
    return found
