"""Rank 3: what samples for `data.pair_sources` in place of the policy in memory: `PairGenerator`, and vLLM."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sdpo_lightning.generation import Generator
from sdpo_lightning.generation_vllm import VLLMGenerator, VLLMSettings, check_vllm


class PairGenerator(ABC):
    """Answers for M_{t-1}, from its folder and with the trainer's memory free. A subclass is a dataclass."""

    def settings(self) -> dict[str, Any]:
        """Plain values that answers depend on: rows of other settings aren't taken for these."""
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", **asdict(self)}  # type: ignore[call-overload]

    def check(self) -> None:  # noqa: B027
        """Refuse what would end the run later; called on rank 0 before any weights are loaded.

        Raises:
            ConfigurationError: with the setting to change.
        """

    @abstractmethod
    def open(self, folder: Path, devices: Sequence[torch.device]) -> Generator:
        """What answers; used as a context, on rank 0 alone.

        Args:
            folder: M_{t-1} as a Hugging Face folder with its tokenizer, weights in fp32; adapters are merged.
            devices: of the ranks of this machine, which have set their memory aside.
        """


@dataclass(frozen=True)
class VLLMPairGenerator(VLLMSettings, PairGenerator):
    """vLLM in a process of its own, which loads M_{t-1} once a stage.

    Attributes:
        python: interpreter of an environment that has vLLM; None is this one.
        dtype: of the weights; vLLM's own `auto` would take fp16 for a folder in fp32.
        gpu_memory_utilization: share of a card that it takes; the trainer's context stays there.
        tensor_parallel_size: cards.
        max_model_len: most tokens of prompt + answer; None is the model's.
    """

    dtype: str = "bfloat16"

    def check(self) -> None:
        """See `PairGenerator.check`."""
        check_vllm(self)

    def open(self, folder: Path, devices: Sequence[torch.device]) -> Generator:
        """See `PairGenerator.open`."""
        cards = [device.index or 0 for device in devices if device.type == "cuda"]
        return VLLMGenerator(folder, self, cards)


def read_pair_generator(value: Mapping[str, Any] | None) -> PairGenerator | None:
    """`data.pair_generator` of plain values: ours is made, the code of others isn't run.

    Args:
        value: `class_path` and `init_args`.
    """
    if value is None or value["class_path"] not in (
        f"{__name__}.VLLMPairGenerator",
        "sdpo_lightning.VLLMPairGenerator",
    ):
        return None
    return VLLMPairGenerator(**(value.get("init_args") or {}))
