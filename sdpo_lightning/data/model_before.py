"""Rank 4: M_{t-1} as what answers prompts, just before stage t: the policy in memory, or its folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from sdpo_lightning.data.pair_generators import PairGenerator
from sdpo_lightning.generation import Generator
from sdpo_lightning.generation_transformers import FolderGenerator, TransformersGenerator
from sdpo_lightning.hf_folder import save_hf, save_merged
from sdpo_lightning.ranks import is_first
from sdpo_lightning.sharding import is_sharded
from sdpo_lightning.trainer_memory import memory_released


@contextmanager
def model_before(
    trainer: pl.Trainer, tokenizer: Any, name: str, folder: Path, chosen: PairGenerator | None
) -> Iterator[Callable[[], AbstractContextManager[Generator]]]:
    """How rank 0 gets M_{t-1} to answer. A collective on entering.

    A policy that is whole answers itself. What is cut, or is to be read by somebody else, is written to a folder that
    is deleted afterwards; all ranks set their memory aside meanwhile.

    Args:
        trainer: of the run; the policy is M_{t-1} now.
        tokenizer: of the policy.
        name: M_{t-1}, for records.
        folder: where to write it.
        chosen: `data.pair_generator`.
    """
    # A DPOLitModule, which stands in a rank above.
    module: Any = trainer.lightning_module
    policy, device = module.policy, trainer.strategy.root_device
    if chosen is None and not is_sharded(policy):
        context = trainer.precision_plugin.forward_context
        yield lambda: _on(device, TransformersGenerator(policy.model, tokenizer, name=name, context=context))
        return
    try:
        if module.lora is not None and chosen is not None:
            save_merged(policy, folder, tokenizer)
        else:
            save_hf(policy, folder, tokenizer)
        with memory_released([policy, *module.reference.models()], trainer.optimizers, device):
            if chosen is not None:
                yield partial(chosen.open, folder, _devices(trainer))
            else:
                mixed = str(trainer.precision) == "bf16-mixed"
                context = partial(torch.autocast, device.type, torch.bfloat16) if mixed else nullcontext
                # The numbers of a policy in memory: its master weights.
                whole = FolderGenerator(folder, device=str(device), dtype="float32", context=context)
                yield lambda: _on(device, whole)
    finally:
        if is_first():
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _on(device: torch.device, generator: Generator) -> Iterator[Generator]:
    """A generator in a thread, whose current device would be the first."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), generator:
        yield generator


def _devices(trainer: pl.Trainer) -> Sequence[Any]:
    root = trainer.strategy.root_device
    return [root] if root.type == "cpu" else [torch.device(root.type, index) for index in trainer.device_ids]
