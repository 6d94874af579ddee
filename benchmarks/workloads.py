"""Seeded random pairs of token ids with UltraFeedback-like lengths, for models with random weights."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.flops import Pair, Shape

# Medians (tokens) and sigmas of the log-normal lengths of prompt, chosen and rejected answer.
MEDIANS, SIGMAS = (120.0, 260.0, 240.0), (0.9, 0.6, 0.65)
SHORTEST = 4
Ids = tuple[list[int], list[int], list[int]]


def pair_lengths(count: int, max_length: int = 1024, scale: float = 1.0, seed: int = 0) -> list[Pair]:
    """Token counts (prompt, chosen, rejected), each side cut at `max_length`, a prompt at half of it.

    Args:
        count: pairs.
        max_length: most tokens of prompt + answer at scale 1; it scales too.
        scale: factor on every length of the same draws.
        seed: of the draws.
    """
    generator, most = random.Random(seed), round(max_length * scale)
    pairs = []
    for _ in range(count):
        drawn = [generator.lognormvariate(0, s) * m * scale for m, s in zip(MEDIANS, SIGMAS, strict=True)]
        prompt, chosen, rejected = (max(SHORTEST, round(length)) for length in drawn)
        prompt = min(prompt, most // 2)
        pairs.append((prompt, min(chosen, most - prompt), min(rejected, most - prompt)))
    return pairs


def without_prompts(pairs: Sequence[Pair]) -> list[Pair]:
    """The same answers behind prompts of one token: nothing worth sharing is left."""
    return [(1, chosen, rejected) for _, chosen, rejected in pairs]


def long_pairs(count: int, length: int) -> list[Pair]:
    """Pairs whose sequences prompt + answer both have `length` tokens, half of them the prompt."""
    prompt = length // 2
    return [(prompt, length - prompt, length - prompt)] * count


def pair_ids(pairs: Sequence[Pair], vocab: int, seed: int = 0) -> list[Ids]:
    """Random ids of the given counts, none of them 0 or 1 (padding and EOS); the answers' first tokens differ."""
    generator = random.Random(seed)
    rows = []
    for lengths in pairs:
        prompt, chosen, rejected = ([generator.randrange(2, vocab) for _ in range(n)] for n in lengths)
        while rejected[0] == chosen[0]:
            rejected[0] = generator.randrange(2, vocab)
        rows.append((prompt, chosen, rejected))
    return rows


def pair_rows(pairs: Sequence[Ids]) -> list[dict[str, str]]:
    """Text rows that a word-level tokenizer with the words t0, t1, ... reads as these ids."""

    def words(ids: list[int]) -> str:
        return " ".join(f"t{i}" for i in ids)

    return [{"prompt": words(p), "chosen": " " + words(c), "rejected": " " + words(r)} for p, c, r in pairs]


def llama_config(shape: Shape, positions: int) -> Any:
    """The transformers config of a shape, for rows of so many positions."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=shape.tied,
        pad_token_id=0,
        eos_token_id=1,
    )


def peak_resident() -> int:
    """Most resident memory of this program so far, KiB. Not `ru_maxrss`: that begins with what the parent has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
