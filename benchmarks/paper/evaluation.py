"""What a model's own answers are worth, and how far they are from those of S, by samples."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.paper.language import ANSWER_TOKENS, parsed, preference, quality

Score = tuple[float, float]


@dataclass(frozen=True)
class Generations:
    """Figures of a model's answers, each with its standard error, clustered by prompt.

    Attributes:
        preference: chance to be truly preferred to an answer of the SFT distribution, in [0, 1].
        quality: points of 100.
        malformed: share of answers that aren't of the language's form.
        kl: KL(model to S), nats an answer.
        samples: answers drawn.
    """

    preference: Score
    quality: Score
    malformed: Score
    kl: Score
    samples: int

    def row(self) -> dict[str, object]:
        """As plain values."""
        return asdict(self)


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An exported model in fp32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def sample(model: PreTrainedModel, prompts: Tensor, eos: int, seed: int, tokens: int = ANSWER_TOKENS) -> Tensor:
    """Answers at temperature 1.

    Args:
        model: a causal LM.
        prompts: `[N, P]` ids, all of one length.
        eos: id that ends an answer.
        seed: of the draws; the global random state is left alone.
        tokens: most tokens of an answer.

    Returns:
        `[N, tokens]`; what follows an EOS is EOS.
    """
    generator, found, cache, inputs = torch.Generator().manual_seed(seed), [], None, prompts
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(tokens):
        out = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        drawn = torch.multinomial(out.logits[:, -1].float().softmax(-1), 1, generator=generator)
        drawn[ended] = eos
        ended |= drawn[:, 0] == eos
        found.append(drawn)
        inputs = drawn
    return torch.cat(found, 1)


@torch.no_grad()
def kl_of_answers(model: PreTrainedModel, other: PreTrainedModel, prompts: Tensor, answers: Tensor, eos: int) -> Tensor:
    """KL(model to other), estimated at each answer that the model has drawn.

    The sum over an answer's positions, its EOS included, of the KL of the two next-token distributions there: its mean
    over answers of the model is the KL of the distributions of answers, with less spread than the log-ratio has.

    Args:
        model: which drew the answers.
        other: to compare with.
        prompts: `[N, P]` ids.
        answers: `[N, A]` ids, EOS behind the end.
        eos: id that ends an answer.

    Returns:
        `[N]`, nats.
    """
    ids, first = torch.cat([prompts, answers], 1), prompts.shape[1] - 1
    p, q = (m(input_ids=ids).logits[:, first:-1].float().log_softmax(-1) for m in (model, other))
    kl = (p.exp() * (p - q)).sum(-1)
    # A position counts as long as no EOS stands before it.
    ended = (answers == eos).cumsum(1) - (answers == eos).long()
    return torch.where(ended == 0, kl, 0.0).sum(1)


def clustered(values: Sequence[float], clusters: Sequence[str]) -> Score:
    """Mean, and its standard error where values of one cluster go together."""
    mean, sums = sum(values) / len(values), defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - mean
    squares = sum(total**2 for total in sums.values())
    return mean, math.sqrt(squares * len(sums) / max(1, len(sums) - 1)) / len(values)


def evaluate(folder: Path, sft: Path, prompts: Sequence[str], per_prompt: int, seed: int) -> Generations:
    """Sample a model and judge what it says.

    Args:
        folder: of the model.
        sft: of S.
        prompts: of a split.
        per_prompt: answers to each.
        seed: of the draws.
    """
    (model, tokenizer), (other, _) = load(folder), load(sft)
    texts = [prompt for prompt in prompts for _ in range(per_prompt)]
    ids = torch.tensor(tokenizer(texts)["input_ids"])
    eos = tokenizer.eos_token_id
    drawn = sample(model, ids, eos, seed)
    answers = tokenizer.batch_decode(drawn, skip_special_tokens=True)
    # An answer that doesn't end isn't of the form, whatever it says.
    answers = [a if eos in row else "" for a, row in zip(answers, drawn.tolist(), strict=True)]
    return Generations(
        clustered([preference(p, a) for p, a in zip(texts, answers, strict=True)], texts),
        clustered([float(quality(p, a)) for p, a in zip(texts, answers, strict=True)], texts),
        clustered([float(parsed(a) is None) for a in answers], texts),
        clustered(kl_of_answers(model, other, ids, drawn, eos).tolist(), texts),
        len(texts),
    )
