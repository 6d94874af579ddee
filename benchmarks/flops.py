"""FLOPs of preference pairs as arithmetic, and the peaks of GPUs. A multiply and an add are two; norms and such none.

A pair is its token counts (prompt, chosen, rejected). The floor is what has to be computed: each prompt once,
each query against the keys it may see, the head on completion tokens only. What is executed may be more, and a little
less: ours leaves prompts out of parts of the last layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sdpo_lightning.last_layer import read_count

Pair = tuple[int, int, int]
Layout = Literal["shared_prefix", "packed", "padded"]

# TFLOPS of dense bf16, from NVIDIA's data sheets (half of what they print "with sparsity"). The first name that is
# contained in the GPU's counts.
PEAK_TFLOPS = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H200 NVL", 835.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("A100", 312.0),
)


def peak_flops(device_name: str) -> float | None:
    """FLOPs a second of dense bf16, or None for a GPU that isn't in the table."""
    return next((tflops * 1e12 for name, tflops in PEAK_TFLOPS if name in device_name), None)


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool = True

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrices: query and output, key and value, the three of the MLP."""
        kv = self.hidden * self.kv_heads // self.heads
        return 2 * self.hidden**2 + 2 * self.hidden * kv + 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        """All parameters, norms included."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * (self.layer_weights + 2 * self.hidden) + self.hidden


@dataclass(frozen=True)
class Flops:
    """FLOPs of forward passes, by part."""

    body: float = 0.0
    attention: float = 0.0
    head: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.body + other.body, self.attention + other.attention, self.head + other.head)

    @property
    def total(self) -> float:
        """Of all parts."""
        return self.body + self.attention + self.head


def _forward(shape: Shape, tokens: int, scores: int, completion_tokens: int) -> Flops:
    # A score costs 2 FLOPs an element of the heads in q k^T and 2 in p v.
    return Flops(
        body=2.0 * shape.layers * shape.layer_weights * tokens,
        attention=4.0 * shape.layers * shape.hidden * scores,
        head=2.0 * shape.vocab * shape.hidden * completion_tokens,
    )


def _causal(length: int) -> int:
    return length * (length + 1) // 2


def floor_forward(shape: Shape, pairs: Sequence[Pair]) -> Flops:
    """The least that one forward pass over the pairs computes: prompts shared, no masked score, no padding."""
    total = Flops()
    for prompt, chosen, rejected in pairs:
        scores = _causal(prompt + chosen) + rejected * prompt + _causal(rejected)
        total += _forward(shape, prompt + chosen + rejected, scores, chosen + rejected)
    return total


def left_out(shape: Shape, pairs: Sequence[Pair], layout: Layout, micro_batch: int) -> float:
    """FLOPs of the body that ours leaves out of a forward pass: queries, output projection and MLP of the last layer
    where nothing is read of them, in packed rows of layers that aren't compiled.
    """
    total = 0.0
    for start in range(0, len(pairs), micro_batch):
        part = pairs[start : start + micro_batch]
        answers = sum(chosen + rejected for _, chosen, rejected in part)
        tokens = answers + sum(prompt for prompt, _, _ in part) * (1 if layout == "shared_prefix" else 2)
        weights = 2 * shape.hidden**2 + 3 * shape.hidden * shape.intermediate
        total += 2.0 * weights * max(0, tokens - read_count(answers))
    return total


def executed_forward(shape: Shape, pairs: Sequence[Pair], layout: Layout, micro_batch: int) -> Flops:
    """What one forward pass computes in a layout, padding and masked scores included, the last layer whole.

    Scores: a causal kernel skips what it masks, a kernel that is given a mask doesn't.
    """
    total = Flops()
    if layout == "padded":
        for start in range(0, len(pairs), micro_batch):
            total += _padded(shape, pairs[start : start + micro_batch])
        return total
    for prompt, chosen, rejected in pairs:
        if layout == "shared_prefix":
            tokens, scores = prompt + chosen + rejected, _causal(prompt + chosen) + rejected * (prompt + rejected)
        else:
            tokens = 2 * prompt + chosen + rejected
            scores = _causal(prompt + chosen) + _causal(prompt + rejected)
        total += _forward(shape, tokens, scores, chosen + rejected)
    return total


def _padded(shape: Shape, pairs: Sequence[Pair]) -> Flops:
    lengths = [prompt + side for prompt, chosen, rejected in pairs for side in (chosen, rejected)]
    longest, rows = max(lengths), len(lengths)
    scores = rows * (_causal(longest) if min(lengths) == longest else longest**2)
    return _forward(shape, rows * longest, scores, sum(chosen + rejected for _, chosen, rejected in pairs))


def training_flops(
    forward: Flops, frozen: bool = False, checkpointing: bool = False, head_again: bool = False, reference: int = 1
) -> float:
    """One training pass over pairs, backward = 2 forwards, and their reference passes.

    Args:
        forward: of the same pairs.
        frozen: the weights get no gradient (LoRA), which saves one of three; the adapters' own FLOPs, below 1 %,
            aren't counted.
        checkpointing: the layers' forward runs again in the backward pass.
        head_again: the head's forward runs again in the backward pass.
        reference: forward passes without gradients.
    """
    linear = 2 if frozen else 3
    layers = reference + int(checkpointing)
    body, attention = forward.body * (linear + layers), forward.attention * (3 + layers)
    return body + attention + forward.head * (linear + reference + int(head_again))
