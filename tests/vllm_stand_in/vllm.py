"""Stands for vLLM: answers by transformers as `TransformersGenerator` draws them. Writes what it was started with."""

import json
import os
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdpo_lightning.generation import Sampling
from sdpo_lightning.generation_transformers import TransformersGenerator


class SamplingParams:
    """Keeps its arguments."""

    def __init__(self, **given):
        self.given = given


class LLM:
    """A folder in memory."""

    def __init__(self, **given):
        assert "TORCHELASTIC_RUN_ID" not in os.environ and "RANK" not in os.environ
        if path := os.environ.get("STAND_IN_LOG"):
            with open(path, "a") as log:
                log.write(json.dumps(given) + "\n")
        if os.environ.get("STAND_IN_FAILS"):
            raise RuntimeError("CUDA out of memory")
        torch.set_num_threads(1)
        self.tokenizer = AutoTokenizer.from_pretrained(given["tokenizer"])
        model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32)
        self.generator = TransformersGenerator(model, self.tokenizer)

    def generate(self, prompts, params):
        """Texts of prompts that are texts."""
        given = params.given
        sampling = Sampling(given["max_tokens"], given["temperature"], given["top_p"], given["n"], given["seed"])
        texts = [self.tokenizer.decode(prompt["prompt_token_ids"]) for prompt in prompts]
        for answers in self.generator.generate(texts, sampling):
            outputs = [SimpleNamespace(text=a.text, finish_reason="stop" if a.finished else "length") for a in answers]
            yield SimpleNamespace(outputs=outputs)
