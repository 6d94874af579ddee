"""Rows and files that many tests make."""

from __future__ import annotations

import json
import random
import socket
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

WORDS = [f"w{number}" for number in range(60)]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_rows(count: int, seed: int, name: str = "rows") -> list[dict]:
    """String rows with distinct prompts and answers of varied lengths, all words of the tiny vocabulary."""
    generator = random.Random(f"{seed}:{name}")
    rows = []
    for number in range(count):
        prompt = " ".join([WORDS[number % len(WORDS)], *generator.choices(WORDS, k=generator.randint(2, 6))])
        chosen = " ".join(["w1", *generator.choices(WORDS, k=generator.randint(1, 8))])
        rejected = " ".join(["w2", *generator.choices(WORDS, k=generator.randint(1, 8))])
        rows.append({"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected})
    return rows


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: tuple, scale: float, window: int | None
) -> Tensor:
    """`[H, L, E]`, by one L x L mask, written out token by token."""
    length = query.shape[1]
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for start, end, prefix_start, prefix_end in segments:
        for row in range(start, end):
            seen = [*range(prefix_start, prefix_end), *range(start, row + 1)]
            allowed[row, seen[-window:] if window else seen] = True
    key, value = (t.repeat_interleave(query.shape[0] // t.shape[0], 0) for t in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed.to(query.device), scale=scale)


def free_port() -> str:
    """A port for ranks to meet at, which nobody else of this machine listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
