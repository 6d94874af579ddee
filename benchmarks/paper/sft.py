"""S: a tiny Llama trained on the SFT distribution of the language."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.paper.language import PROMPT_WORDS, WORDS, draw_answer, prompts_of, writer_of

_SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One id a word; it adds no special token on its own."""
    words = [*_SPECIAL.values(), *WORDS]
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=32, **_SPECIAL)


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int, hidden: int = 64, layers: int = 2) -> LlamaForCausalLM:
    """An untrained model; the global random state stays as it was."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.05,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def write_sft(folder: Path, seed: int, steps: int = 400, batch_size: int = 128, hidden: int = 64) -> None:
    """Train S on answers that are drawn once each, and write it with its tokenizer.

    Args:
        folder: a Hugging Face folder.
        seed: of weights and data.
        steps: optimizer steps.
        batch_size: answers a step.
        hidden: width of the model.
    """
    tokenizer = make_tokenizer()
    model, rng, prompts = make_model(tokenizer, seed, hidden), random.Random(f"sft/{seed}"), prompts_of("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        drawn = rng.choices(prompts, k=batch_size)
        texts = [f"{p}{draw_answer(rng, p, writer_of(p))} {tokenizer.eos_token}" for p in drawn]
        ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        labels = ids[:, PROMPT_WORDS:]
        # Padding stands behind everything, so that a causal model needs no mask.
        logits = model(input_ids=ids).logits[:, PROMPT_WORDS - 1 : -1]
        loss = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=tokenizer.pad_token_id)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
