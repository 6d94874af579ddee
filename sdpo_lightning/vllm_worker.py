"""Rank 0: a program of its own that answers prompts by vLLM until nobody asks any more: `python vllm_worker.py`.

It imports nothing of this package, so that it also runs in an environment that has vLLM alone. Each line that it reads
names two files, `["REQUEST", "ANSWERS"]`; the first request loads the model. At the end of its input it ends, and so
does all that vLLM has started: nothing keeps the memory of a GPU when the asking process dies. Exits with 4 where vLLM
isn't installed; `--check` only looks for it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NOT_INSTALLED = 4

# Seconds to end in order after the end of the input.
_LAST_SECONDS = 10.0


def answer(engine: Any, request: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The answers to all prompts of a request.

    Args:
        engine: a `vllm.LLM`.
        request: `sampling` (of `vllm.SamplingParams`), `prompts`: lists of token ids.
    """
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    outputs = engine.generate(prompts, SamplingParams(**request["sampling"]))
    return [[{"text": o.text, "finished": o.finish_reason == "stop"} for o in output.outputs] for output in outputs]


def serve(asked: queue.Queue[str | None]) -> None:
    """Answer request after request, by the engine of the first.

    Args:
        asked: lines; None is the end.
    """
    engine = None
    while (line := asked.get()) is not None:
        source, target = map(Path, json.loads(line))
        request = json.loads(source.read_text())
        if engine is None:
            from vllm import LLM

            engine = LLM(**request["engine"])
        staging = target.with_suffix(".tmp")
        staging.write_text(json.dumps(answer(engine, request)))
        os.replace(staging, target)


def _listen(asked: queue.Queue[str | None]) -> None:
    for line in sys.stdin:
        asked.put(line)
    asked.put(None)
    time.sleep(_LAST_SECONDS)
    # Still at work for somebody who is gone. A group of one's own: vLLM's processes are in it.
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


def main(words: Sequence[str]) -> int:
    """Answer what is asked on standard input.

    Args:
        words: none, or `--check`.

    Returns:
        The exit code.
    """
    if importlib.util.find_spec("vllm") is None:
        return NOT_INSTALLED
    if list(words) == ["--check"]:
        return 0
    asked: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_listen, args=(asked,), daemon=True).start()
    serve(asked)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
