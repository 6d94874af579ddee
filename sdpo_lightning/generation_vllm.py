"""Rank 2: answers by vLLM, in a process whose end gives its memory back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from transformers import AutoTokenizer

from sdpo_lightning.generation import Answer, Generator, Prompt, Sampling, prompt_ids
from sdpo_lightning.stopping import STOP
from sdpo_lightning.types import ConfigurationError
from sdpo_lightning.vllm_worker import NOT_INSTALLED

_WORKER = Path(__file__).with_name("vllm_worker.py")
# Of a process that `torchrun` has started: one that it starts itself is no rank, and would wait to meet the others.
_OF_RANKS = ("RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
_BEGINNINGS = ("LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_", "PL_")
# Seconds between two looks at the process, and until one that was told to end is killed.
_LOOK, _PATIENCE = 0.2, 30.0


@dataclass(frozen=True)
class VLLMSettings:
    """How vLLM loads a model.

    Attributes:
        python: interpreter of an environment that has vLLM; None is this one.
        dtype: of the weights.
        gpu_memory_utilization: share of the card that it takes.
        tensor_parallel_size: cards.
        max_model_len: most tokens of prompt + answer; None is the model's.
    """

    python: str | None = None
    dtype: str = "auto"
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    max_model_len: int | None = None


def check_vllm(settings: VLLMSettings) -> None:
    """Look for vLLM.

    Raises:
        ConfigurationError: it isn't installed.
    """
    python = settings.python or sys.executable
    try:
        code = subprocess.run([python, str(_WORKER), "--check"], capture_output=True, env=_environment(())).returncode
    except OSError as error:
        raise ConfigurationError(f"`python` of VLLMSettings: {error}") from error
    if code:
        raise ConfigurationError(
            f"vLLM isn't installed for {python}: `pip install 'sdpo-lightning[vllm]'`, or name the interpreter of an "
            "environment that has it in `python` of VLLMSettings, or generate by transformers"
        )


class VLLMGenerator(Generator):
    """A model folder, loaded anew by each call; within a `with` once, until its end.

    What else holds the card's memory has to let go of it before.

    Args:
        folder: of the model, or its hub name.
        settings: of vLLM.
        cards: numbers of the cards that it may take, counted as this process counts them; none: all that it sees.

    Raises:
        ConfigurationError: vLLM isn't installed.
    """

    def __init__(
        self, folder: str | Path, settings: VLLMSettings | None = None, cards: Sequence[int] = ()
    ) -> None:
        self._folder, self._settings, self._cards = str(folder), settings or VLLMSettings(), tuple(cards)
        self._kept = False
        self._process: _Process | None = None
        check_vllm(self._settings)

    @property
    def model_name(self) -> str:
        """The folder."""
        return self._folder

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Answer]]:
        """See `Generator.generate`.

        Raises:
            OSError: the process has failed; its last lines are in the message.
            SystemExit: a signal asked the run to stop.
        """
        tokenizer = AutoTokenizer.from_pretrained(self._folder, trust_remote_code=False)
        request = {
            "engine": self._engine(sampling.seed),
            "sampling": {
                "n": sampling.answers,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_tokens": sampling.max_new_tokens,
                "seed": sampling.seed,
            },
            "prompts": [prompt_ids(tokenizer, prompt) for prompt in prompts],
        }
        if self._process is None:
            self._process = _Process(self._settings.python or sys.executable, self._folder, self._cards)
        try:
            found = self._process.ask(request)
        except BaseException:
            self._process.kill()
            self._process = None
            raise
        if not self._kept:
            self.close()
        return [[Answer(one["text"], one["finished"]) for one in row] for row in found]

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.end()

    def __enter__(self) -> Self:
        self._kept = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kept = False
        self.close()

    def _engine(self, seed: int) -> dict[str, Any]:
        given = self._settings
        return {
            "model": self._folder,
            "tokenizer": self._folder,
            "dtype": given.dtype,
            "gpu_memory_utilization": given.gpu_memory_utilization,
            "tensor_parallel_size": given.tensor_parallel_size,
            "max_model_len": given.max_model_len,
            "trust_remote_code": False,
            "seed": seed,
        }


class _Process:
    """`vllm_worker.py`, in a session of its own with all that vLLM starts."""

    def __init__(self, python: str, folder: str, cards: Sequence[int]) -> None:
        self._folder, self._place, self._asked = folder, tempfile.TemporaryDirectory(), 0
        self._log = Path(self._place.name) / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [python, str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=_environment(cards),
                start_new_session=True,
            )

    def ask(self, request: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
        """The answers, however long they take."""
        self._asked += 1
        source, target = (Path(self._place.name) / f"{name}-{self._asked}.json" for name in ("request", "answers"))
        source.write_text(json.dumps(request))
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{json.dumps([str(source), str(target)])}\n".encode())
            self._process.stdin.flush()
        while not target.exists():
            STOP.leave_if_asked()
            with suppress(subprocess.TimeoutExpired):
                code = self._process.wait(_LOOK)
                raise OSError(f"vLLM ended with {code} on {self._folder}: {self._why(code)}")
        return json.loads(target.read_text())

    def _why(self, code: int) -> str:
        if code == NOT_INSTALLED:
            return "it isn't installed"
        return " ".join(self._log.read_text(errors="replace").split())[-600:]

    def end(self) -> None:
        """Let it end in order."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE)
        self.kill()

    def kill(self) -> None:
        """End it at once, and what it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._place.cleanup()


def _environment(cards: Sequence[int]) -> dict[str, str]:
    """Of a process that is no rank, and sees some cards only."""
    kept = {k: v for k, v in os.environ.items() if k not in _OF_RANKS and not k.startswith(_BEGINNINGS)}
    if cards:
        seen = [card for card in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if card]
        kept["CUDA_VISIBLE_DEVICES"] = ",".join(seen[card] if seen else str(card) for card in cards)
    return kept
