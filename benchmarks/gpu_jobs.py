"""What `gpu.py` runs: settings and jobs, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.flops import Pair, Shape
from benchmarks.workloads import long_pairs, pair_lengths, without_prompts

VARIANTS = ("ours", "packed", "trl_default", "trl_best")
# The first loss is log 2 whatever is computed; the second and third stand behind an optimizer step.
CHECK_STEPS = 3


@dataclass(frozen=True)
class Setting:
    """A model and how it is trained, the same on all sides.

    Attributes:
        shape: of the Llama.
        weights: dtype of the weights (of the frozen ones, for LoRA).
        bf16: computes under bf16 autocast.
        eight_bit: Adam with 8-bit states (bitsandbytes), else PyTorch's fused AdamW.
        lora: r = 16 on all linear layers of attention and MLP, adapters in fp32; the base is frozen.
        learning_rate: such that three steps move the loss by far more than the tolerance.
        tolerance: largest difference of a loss, nats.
    """

    shape: Shape
    weights: str = "float32"
    bf16: bool = True
    eight_bit: bool = False
    lora: bool = False
    learning_rate: float = 1e-5
    tolerance: float = 2e-2

    def described(self) -> dict[str, Any]:
        """Model, dtypes and optimizer of all sides, for the report."""
        return {
            "model": asdict(self.shape) | {"parameters": self.shape.parameters},
            "weights": self.weights,
            "compute": "bf16 autocast" if self.bf16 else self.weights,
            "trained": "LoRA r=16 on attention and MLP, fp32 adapters" if self.lora else "all weights",
            "optimizer": "AdamW8bit (bitsandbytes)" if self.eight_bit else "AdamW, fused",
        }


_TINY = Shape(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=128, vocab=512)
_1B = Shape(hidden=2048, layers=16, heads=32, kv_heads=8, intermediate=8192, vocab=128_256)
_8B = Shape(hidden=4096, layers=32, heads=32, kv_heads=8, intermediate=14_336, vocab=128_256, tied=False)
SETTINGS = {
    "tiny": Setting(_TINY, bf16=False, learning_rate=1e-4, tolerance=2e-5),
    "tiny_lora": Setting(_TINY, bf16=False, lora=True, learning_rate=1e-2, tolerance=2e-5),
    "1b": Setting(_1B, learning_rate=5e-6),
    # fp32 weights and gradients of 8B parameters alone would take 64 GB.
    "8b": Setting(_8B, weights="bfloat16", eight_bit=True),
    "8b_lora": Setting(_8B, weights="bfloat16", lora=True, learning_rate=1e-3),
}


@dataclass(frozen=True)
class Job:
    """One variant at one micro-batch, for a process of its own.

    Attributes:
        setting: name of a `Setting`.
        device: torch's name.
        length: most tokens of prompt + answer; above 1024, all sequences have that many.
        pairs: that are timed.
        step_pairs: pairs an optimizer step.
        variant: one of `VARIANTS`.
        micro_batch: pairs at once; divides `step_pairs`.
        shared_nothing: prompts of one token.
        checkpointing: of all layers.
        offload: activations live in the host's memory until the backward pass.
        compiled: the layers go through `torch.compile`.
        logits_budget_mb: of `CausalBackbone`.
    """

    setting: str
    device: str
    length: int
    pairs: int
    step_pairs: int
    variant: str = "ours"
    micro_batch: int = 1
    shared_nothing: bool = False
    checkpointing: bool = False
    offload: bool = False
    compiled: bool = False
    logits_budget_mb: float = 256.0

    @property
    def check_pairs(self) -> list[Pair]:
        """Token counts of the pairs of each step whose losses are compared; the same for all variants."""
        return self._pairs(self.step_pairs, seed=1)

    @property
    def timed_pairs(self) -> list[Pair]:
        """Token counts of the pairs that are timed, in the variant's order."""
        pairs = self._pairs(self.pairs, seed=0)
        if self.variant == "trl_best":
            # What grouping by length is there for: little padding.
            return sorted(pairs, key=_longest)
        return pairs

    def _pairs(self, count: int, seed: int) -> list[Pair]:
        pairs = long_pairs(count, self.length) if self.length > 1024 else pair_lengths(count, self.length, seed=seed)
        return without_prompts(pairs) if self.shared_nothing else pairs


def _longest(pair: Sequence[int]) -> int:
    prompt, chosen, rejected = pair
    return prompt + max(chosen, rejected)
