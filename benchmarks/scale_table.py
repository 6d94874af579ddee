"""The tables of `docs/scaling.md`, by the arithmetic of `estimate`: `python -m benchmarks.scale_table`.

Nothing here is measured: no such run was made by us.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from transformers import LlamaConfig

from sdpo_lightning.data.collate import SharedPrefixCollator
from sdpo_lightning.estimate import peak
from sdpo_lightning.estimate_run import Lora, Run, StageLoad, load_of
from sdpo_lightning.shapes import ModelShape, model_shape

_KEYS = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
# Llama 3 and 3.1, arXiv 2407.21783, table 3.
SIZES = {
    "8B": (4096, 32, 14336, 32, 8),
    "70B": (8192, 80, 28672, 64, 8),
    "405B": (16384, 126, 53248, 128, 8),
}
RANKS = (8, 16, 64, 128, 512)
LONGEST = (("8B", 1, True), ("8B", 8, False), ("70B", 8, True), ("70B", 64, False), ("405B", 512, False))
CARDS = (80, 141)


def shape_of(name: str) -> ModelShape:
    """Sizes of a Llama by its name, computed with in bf16."""
    sizes = dict(zip(_KEYS, SIZES[name], strict=True))
    return model_shape(LlamaConfig(**sizes, vocab_size=128_256, tie_word_embeddings=False), True)


def gigabytes(shape: ModelShape, ranks: int, reference: str, lora: bool, length: int = 1024) -> float:
    """Peak of a rank in 10^9 bytes: one pair a micro-batch, layers recomputed, prompt and answers of half a length."""
    half = np.full((3, 1), length // 2)
    load = load_of(half, SharedPrefixCollator(0, 64))
    run = Run(
        shape, ranks=ranks, ranks_a_node=8, shards=ranks, cuda=True, bf16=True, reference=reference, recompute=1,
        lora=Lora(16) if lora else None,
    )  # fmt: skip
    return peak(run, StageLoad("s", None, load, load)).total / 1e9


def longest_pair(shape: ModelShape, ranks: int, lora: bool, card: int) -> int:
    """Largest power of two of tokens a side that fits; 0 if none from 512 up does."""
    reference = "adapter" if lora else "cached"
    fits = [n for n in (2**k for k in range(9, 21)) if gigabytes(shape, ranks, reference, lora, n) < card]
    return max(fits, default=0)


def rows() -> Iterator[str]:
    """The lines of both tables, as Markdown."""
    shapes = {name: shape_of(name) for name in SIZES}
    yield "| model | ranks | full, cached | full, resident | LoRA r 16 |"
    yield "|---|---|---|---|---|"
    for name, shape in shapes.items():
        for ranks in RANKS:
            kinds = (("cached", False), ("resident", False), ("adapter", True))
            cells = [f"{gigabytes(shape, ranks, reference, lora):.0f}" for reference, lora in kinds]
            yield f"| {name} | {ranks} | {' | '.join(cells)} |"
    yield ""
    yield "| model | ranks | trained | 80 GB | 141 GB |"
    yield "|---|---|---|---|---|"
    for name, ranks, lora in LONGEST:
        cells = [str(longest_pair(shapes[name], ranks, lora, card) or "none") for card in CARDS]
        yield f"| {name} | {ranks} | {'LoRA' if lora else 'full'} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join(rows()))
