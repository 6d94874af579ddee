"""Rank 2: answers by a transformers model in this process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from sdpo_lightning.attention import packed_rows
from sdpo_lightning.casts import CASTS
from sdpo_lightning.generation import Answer, Generator, Prompt, Sampling, prompt_ids
from sdpo_lightning.types import ConfigurationError


class TransformersGenerator(Generator):
    """A model in memory; neither its weights nor a random state of the process change.

    Args:
        model: a transformers model with `generate`.
        tokenizer: its tokenizer.
        batch_size: answers that are drawn at a time; other sizes draw others.
        name: for records.
        context: entered around each call of the model, for autocast.

    Raises:
        ConfigurationError: a batch of less than one.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int = 8,
        name: str = "",
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if batch_size < 1:
            raise ConfigurationError(f"`batch_size` of a generator is {batch_size}, expected at least 1")
        self._model = model
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._name = name or str(model.config.name_or_path)
        self._context = context

    @property
    def model_name(self) -> str:
        """The name given, or the folder's."""
        return self._name

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Answer]]:
        """See `Generator.generate`. The longest prompts first, so that a lack of memory shows at once.

        Raises:
            ConfigurationError: a prompt that fills the model's positions.
        """
        ids = [prompt_ids(self._tokenizer, prompt) for prompt in prompts]
        places = sorted((p for p in range(len(ids)) for _ in range(sampling.answers)), key=lambda p: -len(ids[p]))
        found: list[list[Answer]] = [[] for _ in prompts]
        with self._quiet(sampling.seed):
            for start in range(0, len(places), self._batch_size):
                part = places[start : start + self._batch_size]
                for place, row in zip(part, self._rows([ids[p] for p in part], sampling), strict=True):
                    found[place].append(self._read(prompts[place], ids[place], row))
        return found

    @contextmanager
    def _quiet(self, seed: int) -> Iterator[None]:
        """Eval mode and draws of their own; all as before afterwards."""
        device = self._model.device
        # Some may be in eval mode within a model in training.
        in_training = [module for module in self._model.modules() if module.training]
        self._model.eval()
        devices = [device] if device.type == "cuda" else []
        try:
            with (
                torch.random.fork_rng(devices),
                torch.no_grad(),
                packed_rows(False),
                self._context(),
                CASTS.generating(),
            ):
                torch.manual_seed(seed)
                yield
        finally:
            for module in in_training:
                module.training = True

    def _rows(self, ids: list[list[int]], sampling: Sampling) -> list[list[int]]:
        width, device = max(len(row) for row in ids), self._model.device
        ends = self._ends()
        pad = self._tokenizer.pad_token_id
        pad = (ends[0] if ends else 0) if pad is None else pad
        rows = torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        settings = GenerationConfig(
            max_new_tokens=self._room(width, sampling.max_new_tokens),
            do_sample=sampling.temperature > 0,
            eos_token_id=ends or None,
            pad_token_id=pad,
            **(drawn if sampling.temperature else {}),
        )
        found = self._model.generate(input_ids=rows, attention_mask=mask, generation_config=settings)
        return found[:, width:].tolist()

    def _ends(self) -> list[int]:
        ends = self._model.generation_config.eos_token_id
        if ends is None:
            ends = self._tokenizer.eos_token_id
        return ends if isinstance(ends, list) else [] if ends is None else [ends]

    def _room(self, width: int, wanted: int) -> int:
        most = getattr(self._model.config, "max_position_embeddings", None) or width + wanted
        if width >= most:
            raise ConfigurationError(f"a prompt has {width} tokens, and {self._name} takes {most} with the answer")
        return min(wanted, most - width)

    def _read(self, prompt: Prompt, ids: list[int], row: list[int]) -> Answer:
        ends = set(self._ends())
        end = next((place for place, token in enumerate(row) if token in ends), None)
        if not isinstance(prompt, str):
            return Answer(self._tokenizer.decode(row[:end], skip_special_tokens=True), end is not None)
        # As a continuation: some tokenizers drop the space in front of what is decoded alone.
        before, whole = (self._tokenizer.decode(part, skip_special_tokens=True) for part in (ids, ids + row[:end]))
        return Answer(whole.removeprefix(before), end is not None)


class FolderGenerator(Generator):
    """A model folder or hub name, read when it is first asked and freed by `close`; adapter folders too (peft).

    Args:
        folder: of the model.
        batch_size: answers that are drawn at a time.
        device: where it runs; default: a GPU where there is one.
        dtype: of its weights; default: bfloat16 on a GPU, else float32.
        context: entered around each call of the model, for autocast.
    """

    def __init__(
        self,
        folder: str | Path,
        batch_size: int = 8,
        device: str | None = None,
        dtype: str | None = None,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._folder, self._batch_size = str(folder), batch_size
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._dtype = dtype or ("bfloat16" if self._device.startswith("cuda") else "float32")
        self._context = context
        self._loaded: TransformersGenerator | None = None

    @property
    def model_name(self) -> str:
        """The folder."""
        return self._folder

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Answer]]:
        """See `Generator.generate`.

        Raises:
            ConfigurationError: there is no such model.
        """
        if self._loaded is None:
            try:
                # Neither runs code of the folder.
                tokenizer = AutoTokenizer.from_pretrained(self._folder, trust_remote_code=False)
                model: Any = AutoModelForCausalLM.from_pretrained(
                    self._folder, dtype=self._dtype, trust_remote_code=False, use_safetensors=True
                )
            except (OSError, ValueError, ImportError) as error:
                raise ConfigurationError(f"no model in {self._folder!r}: {str(error).splitlines()[0]}") from error
            moved = model.to(self._device)
            self._loaded = TransformersGenerator(moved, tokenizer, self._batch_size, self._folder, self._context)
        return self._loaded.generate(prompts, sampling)

    def close(self) -> None:
        """Let go of the model."""
        self._loaded = None
        gc.collect()
        if self._device.startswith("cuda"):
            torch.cuda.empty_cache()
