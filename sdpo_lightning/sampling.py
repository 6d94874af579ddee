"""Rank 2: prompts to sample on, answers drawn from a model itself, and means over them with standard errors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from sdpo_lightning.attention import packed_rows
from sdpo_lightning.casts import CASTS

Message = dict[str, str]


@dataclass(frozen=True)
class Answer:
    """One answer that was drawn from a model.

    Attributes:
        ids: its tokens, the end token included.
        entropy: of the model's distribution over the next token, mean over the answer's tokens (nats).
        ended: whether its last token is an end token; else it was cut.
    """

    ids: list[int]
    entropy: float
    ended: bool


@dataclass(frozen=True)
class Scored:
    """An answer with the logps of three models, summed over its tokens (nats).

    Attributes:
        answer: as it was drawn from the policy.
        policy: logp of the policy.
        reference: of the reference; None where that has no weights to give it.
        sft: of S.
    """

    answer: Answer
    policy: float
    reference: float | None
    sft: float


def chosen_prompts(
    data: Any, prompts: Sequence[str | list[Message]] | None, count: int
) -> list[tuple[str | None, list[int]]]:
    """Source (None of an own prompt) and ids of each prompt to sample on.

    Args:
        data: the data module.
        prompts: texts or lists of messages; None takes the first held-out prompts of the sources by turns, or their
            first training prompts where nothing is held out.
        count: how many are taken where none are given.
    """
    if prompts is not None:
        return [(None, prompt_ids(data.tokenizer, prompt)) for prompt in prompts]
    lists = [report.val_ids or report.train_ids for report in data.reports.values()]
    longest = max((len(part) for part in lists), default=0)
    ids = [part[n] for n in range(min(count, longest)) for part in lists if n < len(part)][:count]
    return [(data.source_of(i), pair.prompt_ids) for i, pair in zip(ids, data.store.get(ids), strict=True)]


def prompt_ids(tokenizer: Any, prompt: str | list[Message]) -> list[int]:
    """Ids of a text as it is, or of messages with the generation prompt behind them."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False))


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the model's own, else the tokenizer's."""
    eos = model.generation_config.eos_token_id or tokenizer.eos_token_id
    return list(eos) if isinstance(eos, list) else [eos]


def until_end(answer: list[int], ends: set[int]) -> list[int]:
    """Up to the first end token, which counts; what follows is padding."""
    end = next((i for i, token in enumerate(answer) if token in ends), len(answer) - 1)
    return answer[: end + 1]


def left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Ids and mask `[B, L]` of prompts that end in the same column."""
    width = max(map(len, prompts))
    rows = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    return rows, mask


def uniforms(seed: int, step: int, row: int, count: int) -> Tensor:
    """`[count]` float64 numbers in [0, 1), a pure function of the other arguments: no random state is touched."""
    mixed = int.from_bytes(hashlib.sha256(f"{seed}:{step}:{row}".encode()).digest()[:8], "big") >> 1
    return torch.rand(count, generator=torch.Generator().manual_seed(mixed), dtype=torch.float64)


class DrawByUniforms(LogitsProcessor):
    """Draws each token from softmax(logits), at temperature 1 and uncut, by the inverse of the distribution function.

    What is drawn is left as the only possible token, so a greedy `generate` takes it.

    Args:
        numbers: `[B, T]` float64 in [0, 1), one a token, on the CPU.

    Attributes:
        entropies: of each step `[B]` (nats), on the CPU.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers
        self.entropies: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `[B, V]` -> 0 at the token that is drawn, -inf elsewhere."""
        # On the CPU: CUDA's cumsum isn't deterministic, and refuses where only such kernels are allowed.
        logps = scores.cpu().double().log_softmax(-1)
        chances = logps.exp()
        self.entropies.append(-torch.where(chances > 0, chances * logps, 0.0).sum(-1))
        sums = chances.cumsum(-1)
        drawn = self._numbers[:, len(self.entropies) - 1, None] * sums[:, -1:]
        # The first token whose sum is beyond the number: one of probability 0 never is.
        tokens = torch.searchsorted(sums, drawn, right=True).clamp(max=scores.shape[-1] - 1)
        result = torch.full_like(scores, -math.inf)
        result[torch.arange(len(scores), device=scores.device), tokens[:, 0].to(scores.device)] = 0.0
        return result


@torch.no_grad()
def draw_answers(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], numbers: Tensor, ends: Sequence[int], pad: int
) -> list[Answer]:
    """An answer to each prompt, drawn from the model's own distribution, whatever its generation settings say.

    Args:
        model: in eval mode.
        prompts: ids, B of them.
        numbers: `[B, T]` of `uniforms`; T is the most tokens of an answer.
        ends: tokens that end an answer.
        pad: any valid id.
    """
    rows, mask = left_padded(prompts, pad, model.device)
    settings = GenerationConfig(
        max_new_tokens=numbers.shape[1], do_sample=False, use_cache=True, eos_token_id=list(ends), pad_token_id=pad
    )
    draw = DrawByUniforms(numbers)
    assert isinstance(model, GenerationMixin)
    with packed_rows(False), _no_generation_settings(model), CASTS.generating():
        found = model.generate(
            input_ids=rows,
            attention_mask=mask,
            generation_config=settings,
            logits_processor=LogitsProcessorList([draw]),
        )
    entropies = torch.stack(draw.entropies, 1).tolist()
    answers = []
    for answer, values in zip(found[:, rows.shape[1] :].tolist(), entropies, strict=True):
        ids = until_end(answer, set(ends))
        answers.append(Answer(ids, sum(values[: len(ids)]) / len(ids), ids[-1] in ends))
    return answers


@contextmanager
def _no_generation_settings(model: PreTrainedModel) -> Iterator[None]:
    # A repetition penalty, say, would fill in what the call leaves open: another distribution than the policy's.
    before, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def sample_statistics(rows: Sequence[Scored]) -> dict[str, float]:
    """Means over answers drawn from the policy.

    KL(policy || other) is the expectation, over answers y of the policy, of log pi(y | x) - log other(y | x). The mean
    of that difference estimates it without bias (and may be negative); its standard error takes the answers for
    independent. Answers that are cut at T tokens give the KL of the first T tokens.

    Args:
        rows: at least one.

    Returns:
        `kl_reference` (where it is known) and `kl_sft` with `..._standard_error` (nats an answer; none of one answer),
        `entropy` (nats a token: mean over all tokens), `answer_length` (mean tokens), `ended` (share that wasn't cut)
        and `answers`.
    """
    values: dict[str, float] = {}
    for name, others in (("kl_reference", [row.reference for row in rows]), ("kl_sft", [row.sft for row in rows])):
        differences = [row.policy - other for row, other in zip(rows, others, strict=True) if other is not None]
        if len(differences) == len(rows):
            values |= _mean_and_error(name, differences)
    lengths = [len(row.answer.ids) for row in rows]
    total = sum(row.answer.entropy * length for row, length in zip(rows, lengths, strict=True))
    return values | {
        "entropy": total / sum(lengths),
        "answer_length": sum(lengths) / len(rows),
        "ended": sum(row.answer.ended for row in rows) / len(rows),
        "answers": float(len(rows)),
    }


def _mean_and_error(name: str, values: Sequence[float]) -> dict[str, float]:
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return {name: mean}
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return {name: mean, f"{name}_standard_error": math.sqrt(variance / count)}
