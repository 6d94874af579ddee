"""Rank 2: the verb `env`: what a bug report should say. No paths, no names of users or hosts."""

from __future__ import annotations

import os
from collections.abc import Sequence

from sdpo_lightning.verbs import verb_parser
from sdpo_lightning.versions import versions

_PACKAGES = (
    *("sdpo-lightning", "torch", "lightning", "transformers", "datasets", "tokenizers", "safetensors", "torchmetrics"),
    *("jsonargparse", "numpy", "pyarrow", "bitsandbytes", "peft", "liger-kernel", "matplotlib", "trl", "shtab"),
)


def run_env(words: Sequence[str]) -> None:
    """Print a line a fact.

    Args:
        words: after `env`: none.

    Raises:
        ConfigurationError: a word was given.
    """
    verb_parser("env").parse_args(list(words))
    facts = versions(_PACKAGES) | {"cpus": str(os.cpu_count())} | _devices()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")


def _devices() -> dict[str, str]:
    # Only here: the other verbs of this kind start without it.
    import torch

    facts = {"cuda": f"{torch.version.cuda or 'torch is built without it'}"}
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        facts[f"gpu {number}"] = f"{card.name}, {card.total_memory / 1e9:.0f} GB, capability {card.major}.{card.minor}"
    return facts
