"""Rank 2: text -> ids, ids -> `PreferenceBatch`.

Ids agree with TRL's on well-formed rows: a conversational row goes through the chat template twice (prompt
with the generation prompt; whole dialogue), a string row is tokenised jointly with EOS appended to the
completion if missing. The completion starts where the ids diverge, at the same place on both sides. Masks
go by position, never by token id, so that pad == eos keeps a real EOS in the loss. Unlike TRL, words of others
within a completion aren't scored.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from sdpo_lightning.data.batching import longer_side
from sdpo_lightning.data.messages import Message, Spans, Text, strings_in
from sdpo_lightning.data.packing import Completions, PackedRow
from sdpo_lightning.data.turns import ChatTemplate, UnclearTurns, clipped, common_prefix, scored_tokens
from sdpo_lightning.types import ConfigurationError, PreferenceBatch

Count = TypeVar("Count", int, np.ndarray)
LongPromptRule = Literal["drop", "truncate_left", "error"]
TOO_LONG = "prompt_too_long"


@dataclass(frozen=True)
class TokenizedPair:
    """Ids of one pair after truncation: both sides have the same prompt and at least one completion token.

    Attributes:
        prompt_ids: of both sides.
        chosen_ids: of the completion alone.
        rejected_ids: of the completion alone.
        marks: `prompt_cut` and `completion_cut` by truncation; `prompt_merged`: the prompt's own ids don't begin
            those of prompt + completion, which starts where they part; `unrendered_...`: the row holds something
            that the chat template leaves out.
        chosen_unscored: runs of places in `chosen_ids` that don't count, ascending.
        rejected_unscored: of `rejected_ids`.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    marks: tuple[str, ...] = field(default=(), compare=False)
    chosen_unscored: Spans = ()
    rejected_unscored: Spans = ()

    def text(self) -> str:
        """All that a loss sees of the pair, for digests."""
        ids = f"{self.prompt_ids}{self.chosen_ids}{self.rejected_ids}"
        spans = (self.chosen_unscored, self.rejected_unscored)
        return f"{ids}{spans}" if any(spans) else ids


class PairTokenizer:
    """Turns canonical rows into ids with one tokenizer and one length limit.

    Args:
        tokenizer: a transformers tokenizer with an EOS token.
        max_length: most tokens of prompt + completion; a longer completion loses its end.
        on_long_prompt: what becomes of a prompt without room for a completion: see `data.on_long_prompt`.
        variables: of the chat template, as `enable_thinking`.

    Raises:
        ConfigurationError: a tokenizer without EOS, or a `max_length` below 2.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        on_long_prompt: LongPromptRule = "drop",
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigurationError(
                "the tokenizer has no EOS token, so no answer could end; set `eos_token` in its "
                "tokenizer_config.json or name another one by `data.tokenizer`"
            )
        if max_length < 2:
            raise ConfigurationError(f"`data.max_length` is {max_length}, expected at least 2")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.on_long_prompt: LongPromptRule = on_long_prompt
        self.variables = dict(variables or {})
        added = tokenizer.added_tokens_decoder.values()
        self.special_texts = {t.content for t in added if t.special} | set(tokenizer.all_special_tokens)

    def check_template(self, source_name: str) -> None:
        """Refuse conversational rows without a chat template.

        Raises:
            ConfigurationError: the tokenizer has no chat template.
        """
        if self.tokenizer.chat_template is None:
            raise ConfigurationError(
                f"source {source_name!r} is conversational, but the tokenizer has no chat template; use a chat "
                "model's tokenizer (`data.tokenizer`) or rows of plain strings"
            )

    def with_variables(self, variables: Mapping[str, Any] | None) -> PairTokenizer:
        """The same with other variables of the chat template."""
        return PairTokenizer(self.tokenizer, self.max_length, self.on_long_prompt, variables)

    def unnamed_variables(self) -> list[str]:
        """Variables that stand nowhere in the chat template, so that setting them does nothing."""
        template = str(self.tokenizer.chat_template)  # of several templates all
        return [name for name in self.variables if not re.search(rf"\b{re.escape(name)}\b", template)]

    def __call__(self, prompt: Text, chosen: Text, rejected: Text, extras: str = "") -> TokenizedPair | str:
        """Ids of one row, or the reason why it is dropped: see `tokenize_pair`."""
        return tokenize_pair(self, prompt, chosen, rejected, extras)

    def _holds_special(self, text: Text) -> bool:
        parts = [text] if isinstance(text, str) else [part for m in text for part in _strings_of(m)]
        return any(special in part for part in parts for special in self.special_texts)

    def _string_ids(self, text: str) -> list[int]:
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        # A prompt that was rendered before has its BOS already.
        return ids[1:] if ids[:2] == [self.tokenizer.bos_token_id] * 2 else ids

    def _completed_ids(self, text: str) -> list[int]:
        ids = self._string_ids(text)
        # Some tokenizers append EOS themselves.
        return ids[:-1] if ids[-2:] == [self.tokenizer.eos_token_id] * 2 else ids

    def _with_eos(self, completion: str) -> str:
        eos = self.tokenizer.eos_token
        return completion if completion.endswith(eos) else completion + eos


def _strings_of(message: Message) -> Iterable[str]:
    return (message["content"],) if len(message) == 2 else strings_in(list(message.values()))


def tokenize_pair(
    tokenizer: PairTokenizer, prompt: Text, chosen: Text, rejected: Text, extras: str = ""
) -> TokenizedPair | str:
    """Tokenise and truncate one row.

    Args:
        tokenizer: tokenizer and length limit.
        prompt: a string, or messages `{role, content, ...}`.
        chosen: in the same form.
        rejected: in the same form.
        extras: JSON of `tools` and `chat_template_kwargs` of a dialogue, or "".

    Returns:
        The ids, or a reason: `prompt_too_long` (the prompt alone reaches `max_length`), `empty_completion` (nothing
        left to score), `identical` (equal ids, perhaps after truncation only), `special_token_in_text` (the literal
        text of a control token in an answer would end it), `refused_by_template` (roles that it doesn't take),
        `unclear_turns` (which ids are whose can't be told).
    """
    spans: Sequence[Spans] = ((), ())
    unrendered: tuple[str, ...] = ()
    sides: Sequence[list[int]]
    if isinstance(prompt, str):
        assert isinstance(chosen, str) and isinstance(rejected, str), "rows have one form"
        eos = tokenizer.tokenizer.eos_token
        if any(tokenizer._holds_special(side.removesuffix(eos)) for side in (chosen, rejected)):
            return "special_token_in_text"
        prompt_ids = tokenizer._string_ids(prompt)
        sides = [tokenizer._completed_ids(prompt + tokenizer._with_eos(side)) for side in (chosen, rejected)]
    else:
        assert not isinstance(chosen, str) and not isinstance(rejected, str), "rows have one form"
        if any(tokenizer._holds_special(text) for text in (prompt, chosen, rejected, extras)):
            return "special_token_in_text"
        try:
            template = ChatTemplate.of_row(tokenizer.tokenizer, tokenizer.variables, extras)
            found = template.render(prompt, chosen, rejected)
        except UnclearTurns:
            return "unclear_turns"
        except (TemplateError, TypeError):  # templates add texts to what may be null
            return "refused_by_template"
        prompt_ids, sides, spans, unrendered = found.prompt, found.sides, found.unscored, found.unrendered
    boundary = min(common_prefix(prompt_ids, side) for side in sides)
    # Some tokenizers end every text, and so the prompt, with EOS.
    merged = boundary < len(prompt_ids) - (prompt_ids[-1:] == [tokenizer.tokenizer.eos_token_id])
    marks = ("prompt_merged",) * merged + tuple(f"unrendered_{name}" for name in unrendered)
    return _truncate(tokenizer, sides, boundary, spans, marks)


def _truncate(
    tokenizer: PairTokenizer,
    sides: Sequence[list[int]],
    boundary: int,
    spans: Sequence[Spans],
    marks: tuple[str, ...],
) -> TokenizedPair | str:
    start, most = 0, tokenizer.max_length
    if tokenizer.on_long_prompt == "truncate_left":
        # Half of the length is the completions', if they need it.
        room = min(most // 2, max(map(len, sides)) - boundary)
        start = max(0, boundary + room - most)
    elif boundary >= most:
        return TOO_LONG
    end = start + most
    chosen, rejected = (side[boundary:end] for side in sides)
    unscored = [clipped(runs, boundary, end) for runs in spans]
    # Without a prompt token nothing predicts the first completion token.
    if boundary == 0 or not all(map(scored_tokens, (chosen, rejected), unscored)):
        return "empty_completion"
    if chosen == rejected:
        return "identical"
    cut = any(len(side) > end for side in sides)
    marks = ("prompt_cut",) * (start > 0) + ("completion_cut",) * cut + marks
    return TokenizedPair(sides[0][start:boundary], chosen, rejected, marks, *unscored)


class PreferenceCollator(ABC):
    """Ids of pairs -> one `PreferenceBatch`; a subclass is a layout.

    Args:
        pad_token_id: fills masked positions; any valid id, no loss ever sees it.
        pad_to_multiple_of: row lengths are rounded up to a multiple of it, so that matmuls see few shapes.

    Attributes:
        pads: True where all pairs of a micro-batch take as much room as the longest.
    """

    pads = False

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 1) -> None:
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    @abstractmethod
    def __call__(
        self, pair_ids: Sequence[int], pairs: Sequence[TokenizedPair], weights: Sequence[float], step_pairs: int
    ) -> PreferenceBatch:
        """Build a micro-batch.

        Args:
            pair_ids: B ids.
            pairs: B tokenised pairs.
            weights: B numbers, 0 for filler pairs.
            step_pairs: real pairs of the whole optimizer step.
        """

    @abstractmethod
    def pair_tokens(self, lengths: np.ndarray) -> np.ndarray:
        """Tokens that the model runs on for a pair.

        Args:
            lengths: `[3, P]` int64, of prompt, chosen and rejected.

        Returns:
            `[P]` int64; where the layout `pads`, of the pair alone.
        """

    def row_length(self, tokens: Count) -> Count:
        """Length of a row that holds so many tokens."""
        return -(-tokens // self.pad_to_multiple_of) * self.pad_to_multiple_of


class PaddedCollator(PreferenceCollator):
    """Right-padded rows `[2B, L]`, chosen rows first. Exact for every model."""

    pads = True

    def pair_tokens(self, lengths: np.ndarray) -> np.ndarray:
        """Two rows, `[P]`; see `PreferenceCollator`."""
        return 2 * self.row_length(longer_side(lengths))

    def __call__(
        self, pair_ids: Sequence[int], pairs: Sequence[TokenizedPair], weights: Sequence[float], step_pairs: int
    ) -> PreferenceBatch:
        """Build a micro-batch; see `PreferenceCollator`."""
        sides = [(p.prompt_ids, p.chosen_ids, p.chosen_unscored) for p in pairs]
        sides += [(p.prompt_ids, p.rejected_ids, p.rejected_unscored) for p in pairs]
        longest = max(len(prompt) + len(completion) for prompt, completion, _ in sides)
        length = self.row_length(longest)
        input_ids = torch.full((len(sides), length), self.pad_token_id)
        attention_mask = torch.zeros(len(sides), length, dtype=torch.long)
        builder = Completions(2 * len(pairs))
        for row, (prompt, completion, unscored) in enumerate(sides):
            ids = torch.tensor(prompt + completion)
            input_ids[row, : len(ids)] = ids
            attention_mask[row, : len(ids)] = 1
            first = row * length + len(prompt)
            builder.add(row, first - 1, first, completion, unscored)
        return PreferenceBatch(
            input_ids=input_ids,
            # A model with a table of positions may have none beyond the longest row.
            position_ids=torch.arange(length).clamp(max=longest - 1).expand(len(sides), length).contiguous(),
            attention_mask=attention_mask,
            **builder.tensors(),
            pair_id=torch.tensor(pair_ids, dtype=torch.long),
            weights=torch.tensor(weights, dtype=torch.float32),
            step_pairs=step_pairs,
            num_tokens=int(attention_mask.sum()),
        )


class PackedCollator(PreferenceCollator):
    """One row: each completion behind a prompt of its own, as separate segments; what rounds it up comes last."""

    def __call__(
        self, pair_ids: Sequence[int], pairs: Sequence[TokenizedPair], weights: Sequence[float], step_pairs: int
    ) -> PreferenceBatch:
        """Build a micro-batch; see `PreferenceCollator`."""
        row = PackedRow(len(pairs))
        for number, pair in enumerate(pairs):
            self.add_pair(row, number, number + len(pairs), pair)
        num_tokens = len(row.ids)
        row.fill(self.row_length(num_tokens), self.pad_token_id)
        return PreferenceBatch(
            input_ids=torch.tensor([row.ids]),
            position_ids=torch.tensor([row.positions]),
            attention_mask=None,
            **row.completions.tensors(),
            pair_id=torch.tensor(pair_ids, dtype=torch.long),
            weights=torch.tensor(weights, dtype=torch.float32),
            step_pairs=step_pairs,
            num_tokens=num_tokens,
            segments=tuple(row.segments),
        )

    def pair_tokens(self, lengths: np.ndarray) -> np.ndarray:
        """Two prompts and two completions, `[P]`; see `PreferenceCollator`."""
        return lengths.sum(0) + lengths[0]

    def add_pair(self, row: PackedRow, chosen: int, rejected: int, pair: TokenizedPair) -> None:
        """Append one pair, whose completions are the sequences `chosen` and `rejected`."""
        row.add(chosen, pair.prompt_ids, pair.chosen_ids, pair.chosen_unscored)
        row.add(rejected, pair.prompt_ids, pair.rejected_ids, pair.rejected_unscored)


class SharedPrefixCollator(PackedCollator):
    """One row: the prompt once, and both completions behind it (arXiv 2410.20305)."""

    def pair_tokens(self, lengths: np.ndarray) -> np.ndarray:
        """One prompt and two completions, `[P]`; see `PreferenceCollator`."""
        return lengths.sum(0)

    def add_pair(self, row: PackedRow, chosen: int, rejected: int, pair: TokenizedPair) -> None:
        """Append prompt and chosen completion, then the rejected one, which attends to the same prompt."""
        start = row.add(chosen, pair.prompt_ids, pair.chosen_ids, pair.chosen_unscored)
        row.add_behind(rejected, start, len(pair.prompt_ids), pair.rejected_ids, pair.rejected_unscored)
