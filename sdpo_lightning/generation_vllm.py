"""Rank 2: answers by vLLM, in a process that ends with the call and so gives its memory back."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from sdpo_lightning.generation import Answer, Generator, Prompt, Sampling, prompt_ids
from sdpo_lightning.types import ConfigurationError
from sdpo_lightning.vllm_worker import NOT_INSTALLED

_WORKER = Path(__file__).with_name("vllm_worker.py")


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


class VLLMGenerator(Generator):
    """A model folder, loaded anew by each call. What else holds the card's memory has to let go of it before.

    Args:
        folder: of the model, or its hub name.
        settings: of vLLM.

    Raises:
        ConfigurationError: vLLM isn't installed.
    """

    def __init__(self, folder: str | Path, settings: VLLMSettings | None = None) -> None:
        self._folder, self._settings = str(folder), settings or VLLMSettings()
        self._python = self._settings.python or sys.executable
        try:
            code = subprocess.run([self._python, str(_WORKER), "--check"], capture_output=True).returncode
        except OSError as error:
            raise ConfigurationError(f"`python` of VLLMSettings: {error}") from error
        if code:
            raise ConfigurationError(
                f"vLLM isn't installed for {self._python}: `pip install 'sdpo-lightning[vllm]'`, or name the "
                "interpreter of an environment that has it in `python` of VLLMSettings, or generate by transformers"
            )

    @property
    def model_name(self) -> str:
        """The folder."""
        return self._folder

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Answer]]:
        """See `Generator.generate`.

        Raises:
            OSError: the process has failed; its last lines are in the message.
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
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "request.json", Path(folder) / "answers.json"
            source.write_text(json.dumps(request))
            # An exception here, Ctrl-C too, ends the process.
            command = [self._python, str(_WORKER), str(source), str(target)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
            if done.returncode:
                why = "it isn't installed" if done.returncode == NOT_INSTALLED else " ".join(done.stderr.split())[-600:]
                raise OSError(f"vLLM ended with {done.returncode} on {self._folder}: {why}")
            found = json.loads(target.read_text())
        return [[Answer(one["text"], one["finished"]) for one in row] for row in found]

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
