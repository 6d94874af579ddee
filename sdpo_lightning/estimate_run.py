"""Rank 3: what an estimate is made from: settings of a run, and what a micro-batch makes the model do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from sdpo_lightning.data.batching import longer_side
from sdpo_lightning.data.collate import PaddedCollator, PreferenceCollator, SharedPrefixCollator
from sdpo_lightning.shapes import ModelShape
from sdpo_lightning.tiles import KEPT_KEYS, MAX_KEYS, TILE

# Bytes a weight. nf4: half a byte, an 8-bit scale for each 64 and a second one for each 256 of those (arXiv
# 2305.14314); int8: one, and an fp32 scale a row, which is left out.
QUANTIZED_BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}

ReferenceKind = Literal["resident", "cached", "adapter"]


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters.

    Attributes:
        r: their rank.
        targets: names of linear layers; empty is all within the decoder layers.
        dora: with a magnitude for each output.
        export_merged: the frozen weights stay fp32, to be added to.
    """

    r: int
    targets: tuple[str, ...] = ()
    dora: bool = False
    export_merged: bool = False

    def parameters(self, shape: ModelShape) -> int:
        """Trainable weights that they add."""
        chosen = [linear for linear in shape.linears if not self.targets or linear.name in self.targets]
        return sum(n.count * (self.r * (n.inputs + n.outputs) + self.dora * n.outputs) for n in chosen)


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer keeps.

    Attributes:
        name: as people call it.
        state: bytes a trainable weight.
        temporary: bytes a trainable weight that exist during a step only.
        on_host: the states are paged into the memory of the CPU.
    """

    name: str = "AdamW"
    state: float = 8.0
    temporary: float = 0.0
    on_host: bool = False


@dataclass(frozen=True)
class Load:
    """What a micro-batch of one rank makes the model do.

    Attributes:
        tokens: of all rows, padding included.
        targets: completion tokens, N.
        scores: attention scores a head whose probabilities are kept on a CPU.
        mask: elements of the attention mask, which each layer keeps as numbers; 0 without a mask.
    """

    tokens: int
    targets: int
    scores: int = 0
    mask: int = 0


@dataclass(frozen=True)
class StageLoad:
    """What a stage asks of a rank.

    Attributes:
        name: of the stage.
        pairs: of its chunk; None if unknown.
        load: of its largest micro-batch in training.
        longest: of the largest micro-batch in passes without gradients.
    """

    name: str
    pairs: int | None
    load: Load
    longest: Load


def load_of(lengths: np.ndarray, collator: PreferenceCollator) -> Load:
    """The load of a micro-batch.

    Args:
        lengths: `[3, B]` int64, tokens of prompt, chosen and rejected.
        collator: the layout.
    """
    prompt, chosen, rejected = lengths
    targets = int((chosen + rejected).sum())
    if isinstance(collator, PaddedCollator):
        rows, longest = 2 * lengths.shape[1], collator.row_length(int(longer_side(lengths).max()))
        return Load(rows * longest, targets, mask=rows * longest**2)
    second = prompt + rejected
    whole = _causal(rejected) + rejected * prompt if isinstance(collator, SharedPrefixCollator) else _causal(second)
    # Each answer is in a segment of its own, and a long one's are made again.
    scores = np.where(prompt + chosen <= KEPT_KEYS, _causal(prompt + chosen), 0)
    scores += np.where(second <= KEPT_KEYS, whole, 0)
    short = longer_side(lengths).max() <= MAX_KEYS
    tokens = collator.row_length(int(collator.pair_tokens(lengths).sum()))
    return Load(tokens, targets, scores=int(scores.sum()) if short else 0)


def _causal(length: np.ndarray) -> np.ndarray:
    return length * (length + TILE) // 2


@dataclass(frozen=True)
class Run:
    """The settings of a run that decide what it takes.

    Attributes:
        shape: of the model, in the run's precision.
        ranks: processes over all nodes.
        ranks_a_node: processes of one node.
        shards: ranks that weights, gradients and optimizer states are divided over; 1 is full copies.
        cuda: on GPUs, else on the CPU.
        bf16: bf16-mixed, else fp32.
        reference: second model, logps, or snapshot of the adapter.
        optimizer: what it keeps.
        recompute: layers recomputed: 0 none, 1 all, n every n-th.
        offload: inputs of recomputed layers wait in the memory of the CPU.
        logits_budget_mb: most MiB of logits that are kept.
        accumulate: micro-batches a step.
        lora: adapters; None trains all weights.
        quantization: of the frozen linear layers.
        checkpoints: files kept at the same time, the one in writing included.
        background_saves: checkpoints are copied, and written while training goes on.
        stages: exports M_1 ... M_T.
        pairs: rows of all reference tables; None if unknown.
    """

    shape: ModelShape
    ranks: int = 1
    ranks_a_node: int = 1
    shards: int = 1
    cuda: bool = False
    bf16: bool = False
    reference: ReferenceKind = "resident"
    optimizer: Optimizer = Optimizer()
    recompute: int = 0
    offload: bool = False
    logits_budget_mb: float = 256.0
    accumulate: int = 1
    lora: Lora | None = None
    quantization: Literal["nf4", "int8"] | None = None
    checkpoints: int = 2
    background_saves: bool = False
    stages: int = 1
    pairs: int | None = None

    @property
    def trainable(self) -> int:
        """Trainable weights."""
        return self.shape.parameters if self.lora is None else self.lora.parameters(self.shape)

    @property
    def number(self) -> int:
        """Bytes of a number that is computed with."""
        return 2 if self.bf16 else 4

    @property
    def stores_bf16(self) -> bool:
        """Whether frozen linear layers are held in bf16, and not cast anew for each product."""
        kept = self.lora is None or self.lora.export_merged or self.lora.dora
        return self.bf16 and not self.quantization and not kept

    @property
    def base(self) -> float:
        """Bytes of the model's own weights, unsharded."""
        shape = self.shape
        if self.stores_bf16:
            halved = shape.linear_parameters + (0 if shape.tied else shape.head_parameters)
            return 2.0 * halved + 4 * (shape.parameters - halved)
        quantized = shape.linear_parameters if self.quantization else 0
        small = quantized * QUANTIZED_BYTES[self.quantization] if self.quantization else 0.0
        return small + 4 * (shape.parameters - quantized)

    @property
    def weights(self) -> float:
        """Bytes of all weights of the policy, unsharded."""
        return self.base + (4 * self.trainable if self.lora else 0)
