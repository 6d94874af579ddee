"""Rank 1: dialogues -> ids by the tokenizer's chat template, and which of them are no words of the assistant.

A completion of several turns holds words of others: of the user, or results of tools. No policy writes those, so
they aren't scored. Where a turn begins and ends is found by rendering the dialogue up to it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from sdpo_lightning.data.messages import FIELDS, Message, Spans


class UnclearTurns(Exception):
    """The template renders the beginning of a dialogue otherwise than within the whole."""


@dataclass(frozen=True)
class Rendered:
    """Ids of a dialogue with two ends.

    Attributes:
        prompt: up to where the assistant begins.
        sides: of the whole dialogue with each end.
        unscored: runs of positions in each of them that aren't the assistant's.
        unrendered: what the messages hold and the template leaves out.
    """

    prompt: list[int]
    sides: tuple[list[int], list[int]]
    unscored: tuple[Spans, Spans]
    unrendered: tuple[str, ...] = ()


class ChatTemplate:
    """The chat template of a tokenizer with some of its variables set.

    Args:
        tokenizer: a transformers tokenizer.
        variables: for the template, as `enable_thinking`.
        tools: schemas of the tools that the dialogue may call.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, variables: dict[str, Any], tools: list[Any] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._variables = variables
        self._tools = tools

    @classmethod
    def of_row(cls, tokenizer: PreTrainedTokenizerBase, variables: dict[str, Any], extras: str) -> ChatTemplate:
        """With what a row sets for itself.

        Args:
            tokenizer: a transformers tokenizer.
            variables: of the source; those of the row win.
            extras: JSON of `tools` and `chat_template_kwargs`, or "".
        """
        if not extras:
            return cls(tokenizer, variables)
        own = json.loads(extras)
        return cls(tokenizer, variables | own.get("chat_template_kwargs", {}), own.get("tools"))

    def ids(self, messages: list[Message], opens: bool = False) -> list[int]:
        """Ids of a dialogue.

        Args:
            messages: the dialogue.
            opens: whether a turn of the assistant is to follow.
        """
        ids = self._tokenizer.apply_chat_template(
            messages,
            tools=self._tools,
            add_generation_prompt=opens,
            tokenize=True,
            return_dict=False,
            tokenizer_kwargs={"verbose": False},
            **self._variables,
        )
        return list(ids)

    def render(self, prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> Rendered:
        """Ids of a dialogue with two ends.

        Raises:
            UnclearTurns: turns within a completion can't be found again in its ids.
        """
        missing: tuple[str, ...] = ()
        if self._tools or any(len(message) > 2 for text in (prompt, chosen, rejected) for message in text):
            missing = self._unrendered(prompt, (chosen, rejected))
            if "tool_calls" in missing:
                # Words that aren't there would come out as "None".
                prompt, chosen, rejected = (_worded(text) for text in (prompt, chosen, rejected))
        sides = (self.ids(prompt + chosen), self.ids(prompt + rejected))
        spans = tuple(self._unscored(prompt, s, ids) for s, ids in zip((chosen, rejected), sides, strict=True))
        return Rendered(self.ids(prompt, True), sides, (spans[0], spans[1]), missing)

    def _unscored(self, prompt: list[Message], side: list[Message], whole: list[int]) -> Spans:
        """Runs of positions from the end of an assistant turn to the beginning of the next."""
        found, place = [], 0
        for is_assistant, turns in groupby(side, key=lambda message: message["role"] == "assistant"):
            start, place = place, place + len(list(turns))
            if is_assistant:
                continue
            heard = self.ids(prompt + side[:place])
            begin, end = (self._end_within(part, whole) for part in (self.ids(prompt + side[:start]), heard))
            opened = self.ids(prompt + side[:place], True)
            if opened[: len(heard)] == heard:
                end += common_prefix(opened[len(heard) :], whole[end:])
            if begin > end:
                raise UnclearTurns
            found.append((begin, end))
        return tuple(found)

    def _end_within(self, part: list[int], whole: list[int]) -> int:
        """Where in `whole` a beginning of the dialogue ends.

        A template may write something into the last turn only (Qwen3: an empty thought), which the whole doesn't have
        at that place: one such run of ids is skipped. It lies within a turn, so it doesn't hold what ends one.
        """
        same = common_prefix(part, whole)
        if same == len(part):
            return same
        special = set(self._tokenizer.all_special_ids)
        turn_end = next((number for number in reversed(part) if number in special), None)
        for rest in range(len(part) - same - 1, 0, -1):
            if turn_end in part[same : len(part) - rest]:
                break
            if part[-rest:] == whole[same : same + rest]:
                return same + rest
        raise UnclearTurns

    def _unrendered(self, prompt: list[Message], sides: Sequence[list[Message]]) -> tuple[str, ...]:
        """Fields without which one of the dialogues would read the same."""
        found = []
        for side in sides:
            dialogue = _worded(prompt + side)
            text = self._text(dialogue, self._tools)
            for name in FIELDS:
                if any(name in message for message in dialogue):
                    less = [{key: value for key, value in m.items() if key != name} for m in dialogue]
                    found += [name] if self._text(less, self._tools) == text else []
            if self._tools and self._text(dialogue, None) == text:
                found.append("tools")
        return tuple(dict.fromkeys(found))

    def _text(self, messages: list[Message], tools: list[Any] | None) -> str | None:
        try:
            text = self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **self._variables)
        except Exception:  # a template may fail in any way without what it expects
            return None
        return text if isinstance(text, str) else None


def _worded(messages: list[Message]) -> list[Message]:
    return [message | {"content": ""} if message["content"] is None else message for message in messages]


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many ids two sequences begin with alike."""
    for position, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return position
    return min(len(left), len(right))


def clipped(spans: Spans, start: int, stop: int) -> Spans:
    """The parts of the spans within [start, stop), counted from `start`."""
    cut = ((max(begin, start) - start, min(end, stop) - start) for begin, end in spans)
    return tuple((begin, end) for begin, end in cut if begin < end)


def scored_tokens(ids: list[int], unscored: Spans) -> int:
    """How many tokens of a completion count.

    Args:
        ids: of the completion.
        unscored: runs of places in it that don't.
    """
    return len(ids) - sum(end - begin for begin, end in unscored)
