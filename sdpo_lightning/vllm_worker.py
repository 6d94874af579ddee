"""Rank 0: a program of its own that answers prompts by vLLM and ends: `python vllm_worker.py REQUEST ANSWERS`.

It imports nothing of this package, so that it also runs in an environment that has vLLM alone. Exits with 4 where
vLLM isn't installed; `--check` only looks for it.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NOT_INSTALLED = 4


def answer(request: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The answers to all prompts of a request.

    Args:
        request: `engine` (of `vllm.LLM`), `sampling` (of `vllm.SamplingParams`), `prompts`: lists of token ids.
    """
    from vllm import LLM, SamplingParams

    engine = LLM(**request["engine"])
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    outputs = engine.generate(prompts, SamplingParams(**request["sampling"]))
    return [[{"text": o.text, "finished": o.finish_reason == "stop"} for o in output.outputs] for output in outputs]


def main(words: Sequence[str]) -> int:
    """Read the request, write the answers.

    Args:
        words: two paths, or `--check`.

    Returns:
        The exit code.
    """
    if importlib.util.find_spec("vllm") is None:
        return NOT_INSTALLED
    if list(words) == ["--check"]:
        return 0
    source, target = map(Path, words)
    target.write_text(json.dumps(answer(json.loads(source.read_text()))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
