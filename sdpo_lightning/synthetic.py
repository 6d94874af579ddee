"""Rank 1: generated inputs of the demo: a small language with a known preference rule.

A prompt reads `tell curious neighbours about foxes today :`, an answer ` sure well foxes just really cheers`.
Three binary aspects of an answer are good or bad, one for each source of preferences:

| source | good answers | good in the SFT data |
|---|---|---|
| courtesy | start with a polite word | 80 %, so M_0 finds it easy |
| topic | name the prompt's topic, not its rival | 50 % |
| closing | end in a warm word | 20 %, so M_0 finds it hard |

By rule a pair differs in its source's aspect only: other aspects and filler words are drawn anew for both
sides from the SFT distribution, as noise in gamma. All answers have six words: length decides nothing.
"""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers import PreTrainedTokenizerFast as Fast

Row = dict[str, str]

# Not from easy to hard, so that a ranking has something to do.
SOURCE_NAMES: tuple[str, str, str] = ("topic", "closing", "courtesy")
# Share of good answers in the SFT data, by the mood in the prompt: (calm, hurried). The contrast gives M_0
# a feature to turn: without it DPO lowers both sides of a pair and samples lose their form.
GOOD_SHARES = {"courtesy": (0.98, 0.62), "topic": (0.9, 0.1), "closing": (0.38, 0.02)}

# Calm and hurried moods take turns.
_MOODS = ("patient", "busy", "cheerful", "anxious", "curious", "hasty", "clever", "restless")
_READERS = ("neighbours", "pupils", "sailors", "farmers", "tourists", "bakers", "nurses", "poets")
# A topic and its rival are neighbours: (foxes, hens), (rivers, deserts), ...
_TOPICS = ("foxes", "hens", "rivers", "deserts", "violins", "drums", "apples", "onions")
_TIMES = ("today", "tonight", "tomorrow", "soon", "again", "briefly", "slowly", "twice")
_FILLERS: tuple[str, ...] = ("well", "just", "really", "often", "perhaps", "still")
_FILLERS += ("mostly", "rather", "almost", "quite", "never", "simply")
_POLITE, _RUDE = ("sure", "gladly"), ("ugh", "listen")
_WARM, _COLD = ("cheers", "goodbye"), ("whatever", "enough")
_PAD, _BOS, _EOS, _UNK = "<pad>", "<s>", "</s>", "<unk>"
_MAX_LENGTH, _MAX_NEW_TOKENS = 64, 10


def satisfies(source: str, prompt: str, answer: str) -> bool:
    """The true preference: whether an answer is good in the aspect of one source.

    Args:
        source: one of `SOURCE_NAMES`.
        prompt: a prompt of this language.
        answer: any text; an empty one satisfies nothing.

    Raises:
        ValueError: an unknown source.
    """
    _check_source(source)
    words = answer.split()
    if not words:
        return False
    if source == "courtesy":
        return words[0] in _POLITE
    if source == "closing":
        return words[-1] in _WARM
    named = {word for word in words if word in _TOPICS}
    return named == {word for word in prompt.split() if word in _TOPICS}


def make_pairs(
    source: str, count: int, seed: int, shuffle_labels: bool = False, held_out: bool = False
) -> list[Row]:
    """Draw preference pairs whose chosen side is good, and whose rejected side is bad, in one aspect.

    Args:
        source: one of `SOURCE_NAMES`.
        count: number of pairs.
        seed: the same seed gives the same pairs.
        shuffle_labels: swap the sides of a random half of the same pairs (each with probability 1/2).
        held_out: use prompts that neither the SFT data nor any other pairs have, each at most once.

    Returns:
        Rows `{prompt, chosen, rejected}`; answers start with a space.

    Raises:
        ValueError: an unknown source, or more held-out pairs than held-out prompts.
    """
    _check_source(source)
    rng = random.Random(f"pairs/{source}/{seed}/{held_out}")
    rows = []
    for prompt in _draw_prompts(rng, count, held_out):
        chosen, rejected = (_draw_answer(rng, prompt, {source: good}) for good in (True, False))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    if shuffle_labels:
        # Exactly half, because a surplus of right or of wrong labels would be a signal.
        for index in random.Random(f"labels/{source}/{seed}").sample(range(count), count // 2):
            row = rows[index]
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return rows


def write_inputs(
    folder: Path, seed: int = 0, train_pairs: int = 1024, val_pairs: int = 200, control: bool = False
) -> None:
    """Write all inputs of a run: `<source>.jsonl`, `<source>.val.jsonl` and the SFT model in `model/`.

    Args:
        folder: made where missing; files of these names are replaced.
        seed: of the SFT model and of all pairs.
        train_pairs: training pairs of each source.
        val_pairs: held-out pairs of each source, on prompts of their own.
        control: shuffle the labels of the training pairs; those of the held-out pairs stay right.

    Raises:
        ValueError: `val_pairs` exceeds the number of held-out prompts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for source in SOURCE_NAMES:
        train = make_pairs(source, train_pairs, seed, shuffle_labels=control)
        held_out = make_pairs(source, val_pairs, seed, held_out=True)
        for name, rows in ((f"{source}.jsonl", train), (f"{source}.val.jsonl", held_out)):
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model, tokenizer = train_sft(seed)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def train_sft(
    seed: int, steps: int = 400, batch_size: int = 128
) -> tuple[LlamaForCausalLM, Fast]:
    """Train M_0 from scratch on the SFT distribution; the global random state stays as it was.

    Args:
        seed: of weights and data.
        steps: optimizer steps.
        batch_size: answers a step, never drawn twice.

    Returns:
        The model (fp32, CPU, eval mode) and its tokenizer, which adds no special token on its own.
    """
    tokenizer = _build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build_model(tokenizer)
    rng = random.Random(f"sft/{seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        prompts = _draw_prompts(rng, batch_size, held_out=False)
        logps = _answer_logps(model, tokenizer, prompts, [_draw_answer(rng, p, {}) for p in prompts])
        optimizer.zero_grad()
        (-logps.mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval(), tokenizer


@torch.no_grad()
def preference_rate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    source: str,
    samples: int = 4,
    seed: int = 0,
) -> tuple[float, float]:
    """Share of the model's own answers that are good in one aspect.

    Args:
        model: a causal LM; sampled at temperature 1, up to EOS or 10 tokens.
        tokenizer: its tokenizer.
        rows: rows with a `prompt`.
        source: the aspect, one of `SOURCE_NAMES`.
        samples: answers drawn for each row.
        seed: of the sampling; the global random state is left alone.

    Returns:
        The share and its standard error, clustered by prompt, both in [0, 1].

    Raises:
        ValueError: an unknown source.
    """
    _check_source(source)
    prompts = [row["prompt"] for row in rows for _ in range(samples)]
    with _evaluating(model):
        answers = _sample_answers(model, tokenizer, prompts, seed)
    scores = [float(satisfies(source, p, a)) for p, a in zip(prompts, answers, strict=True)]
    return _clustered_mean(scores, prompts)


@torch.no_grad()
def held_out_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]
) -> tuple[float, float]:
    """Reference-free accuracy: share of pairs with gamma > 0, ties counted 1/2.

    Args:
        model: a causal LM; all rows are scored in one forward.
        tokenizer: its tokenizer; EOS is appended to each answer.
        rows: preference pairs.

    Returns:
        The share and its standard error, clustered by prompt, both in [0, 1].
    """
    prompts = [row["prompt"] for row in rows]
    with _evaluating(model):
        chosen = _answer_logps(model, tokenizer, prompts, [row["chosen"] for row in rows])
        gamma = chosen - _answer_logps(model, tokenizer, prompts, [row["rejected"] for row in rows])
    return _clustered_mean(((gamma.sign() + 1) / 2).tolist(), prompts)


def _check_source(source: str) -> None:
    if source not in SOURCE_NAMES:
        raise ValueError(f"unknown source {source!r}, expected one of {SOURCE_NAMES}")


def _prompts(held_out: bool) -> list[str]:
    """All prompts of one side of the split: every fifth diagonal of the grid of words is held out."""
    columns = (_MOODS, _READERS, _TOPICS, _TIMES)
    prompts = []
    for cell in product(*(range(len(column)) for column in columns)):
        if (sum(cell) % 5 == 0) == held_out:
            mood, reader, topic, time = (column[i] for column, i in zip(columns, cell, strict=True))
            prompts.append(f"tell {mood} {reader} about {topic} {time} :")
    return prompts


_SPLITS = {held_out: _prompts(held_out) for held_out in (False, True)}


def _draw_prompts(rng: random.Random, count: int, held_out: bool) -> list[str]:
    if not held_out:
        return rng.choices(_SPLITS[False], k=count)
    if count > len(_SPLITS[True]):
        raise ValueError(f"{count} held-out pairs, but only {len(_SPLITS[True])} held-out prompts")
    return rng.sample(_SPLITS[True], count)


def _draw_answer(rng: random.Random, prompt: str, fixed: dict[str, bool]) -> str:
    """An answer of the SFT distribution, given some of its aspects."""
    _, mood, _, _, topic_word, *_ = prompt.split()
    hurried, topic = _MOODS.index(mood) % 2, _TOPICS.index(topic_word)
    good = {name: fixed.get(name, rng.random() < shares[hurried]) for name, shares in GOOD_SHARES.items()}
    # Zipf: fillers that differ in frequency are the noise in gamma.
    first, second, third = rng.choices(_FILLERS, [1 / (rank + 1) for rank in range(len(_FILLERS))], k=3)
    opening = rng.choice(_POLITE if good["courtesy"] else _RUDE)
    closing = rng.choice(_WARM if good["closing"] else _COLD)
    named = _TOPICS[topic if good["topic"] else topic ^ 1]
    return f" {opening} {first} {named} {second} {third} {closing}"


def _build_tokenizer() -> Fast:
    words = [_PAD, _BOS, _EOS, _UNK, "tell", "about", ":", *_MOODS, *_READERS, *_TIMES, *_TOPICS, *_FILLERS]
    words += [*_POLITE, *_RUDE, *_WARM, *_COLD]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=_UNK))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": _PAD, "bos_token": _BOS, "eos_token": _EOS, "unk_token": _UNK}
    return Fast(tokenizer_object=core, model_max_length=_MAX_LENGTH, **special)


def _build_model(tokenizer: Fast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=_MAX_LENGTH,
        initializer_range=0.05,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    # Rows of the head that point the same way would make DPO raise other words along with the good ones.
    torch.nn.init.orthogonal_(model.lm_head.weight)
    # top_k is 50 by default: samples would not be the model's distribution.
    model.generation_config.update(do_sample=True, temperature=1.0, top_k=0, max_new_tokens=_MAX_NEW_TOKENS)
    return model


def _answer_logps(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str]
) -> Tensor:
    """Logps `[B]` (nats) of answers given their prompts, summed over the answer's tokens and EOS."""
    prompt_ids = tokenizer(list(prompts))["input_ids"]
    texts = [p + a + tokenizer.eos_token for p, a in zip(prompts, answers, strict=True)]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(model.device)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    token_logps = -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    starts = torch.tensor([len(prompt) - 1 for prompt in prompt_ids], device=ids.device)
    in_answer = torch.arange(ids.shape[1] - 1, device=ids.device) >= starts[:, None]
    return (token_logps * in_answer * mask[:, 1:]).sum(1)


def _sample_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], seed: int
) -> list[str]:
    batch = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt").to(model.device)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    prompt_length = ids.shape[1]
    generator = torch.Generator(model.device).manual_seed(seed)
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(_MAX_NEW_TOKENS):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1).logits
        drawn = torch.multinomial(logits[:, -1].float().softmax(-1), 1, generator=generator)
        drawn[ended] = tokenizer.pad_token_id
        ids, mask = torch.cat([ids, drawn], 1), torch.cat([mask, torch.ones_like(drawn)], 1)
        ended |= drawn[:, 0] == tokenizer.eos_token_id
        if ended.all():
            break
    return tokenizer.batch_decode(ids[:, prompt_length:], skip_special_tokens=True)


def _clustered_mean(scores: Sequence[float], clusters: Sequence[str]) -> tuple[float, float]:
    """Mean and cluster-robust standard error; NaN where there is one cluster only."""
    mean = sum(scores) / len(scores)
    residuals: defaultdict[str, float] = defaultdict(float)
    for score, cluster in zip(scores, clusters, strict=True):
        residuals[cluster] += score - mean
    count = len(residuals)
    if count < 2:
        return mean, math.nan
    squares = sum(residual**2 for residual in residuals.values())
    return mean, math.sqrt(squares * count / (count - 1)) / len(scores)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
