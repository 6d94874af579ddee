"""Rows and files that many tests make."""

from __future__ import annotations

import json
import random
from pathlib import Path

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
