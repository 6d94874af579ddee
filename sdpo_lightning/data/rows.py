"""Rank 1: one record as it stands in a file -> one pair in canonical form, or the reason to drop it."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

Message = dict[str, str]
Text = str | list[Message]
Pair = tuple[Text, Text, Text]  # prompt, chosen, rejected: all strings or all lists of messages

CANONICAL = ("prompt", "chosen", "rejected", "system")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ANSWER = "\n\nAssistant:"


class BadRow(Exception):
    """A row that is dropped; the message is the reason."""


def canonical_pair(record: dict[str, Any] | str, columns: dict[str, str], explicit: bool) -> Pair:
    """Bring one record into canonical form.

    Args:
        record: the needed columns, or the reason why there are none.
        columns: canonical name -> column.
        explicit: whether the source has a prompt column; else the prompt is what both sides share.

    Returns:
        Prompt, chosen, rejected: all strings, or all lists of messages.

    Raises:
        BadRow: with the reason to drop it.
    """
    if isinstance(record, str):
        raise BadRow(record)
    values = {name: record.get(column) for name, column in columns.items()}
    for name in CANONICAL[:3]:
        if values[name] is None and (explicit or name != "prompt"):
            raise BadRow(f"missing_{name}")
    chosen, rejected = _text(values["chosen"]), _text(values["rejected"])
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("wrong_type")
    if explicit:
        pair = _explicit(_text(values["prompt"]), chosen, rejected)
        if "system" in columns:
            pair = _with_system(values["system"], *pair)
    else:
        pair = (_split_strings if isinstance(chosen, str) else _split_messages)(chosen, rejected)
    _check(*pair)
    return pair


def _text(value: Any) -> Text:
    """A string, or messages with nothing but role and content."""
    if isinstance(value, list):
        if not all(isinstance(item, dict) for item in value):
            raise BadRow("wrong_type")
        return [{key: _string(item.get(key)) for key in ("role", "content")} for item in value]
    return _string(value)


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise BadRow("wrong_type")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, as JSON's "\ud83d" alone: Arrow can't hold it
        raise BadRow("invalid_unicode") from None
    return value


def _explicit(prompt: Text, chosen: Text, rejected: Text) -> Pair:
    if isinstance(chosen, str):
        if not isinstance(prompt, str):
            raise BadRow("wrong_type")
        return prompt, chosen, rejected
    if isinstance(prompt, str):
        # Beside whole dialogues the string only repeats what they hold (UltraFeedback).
        if all(side and side[0]["role"] != "assistant" for side in (chosen, rejected)):
            return _split_messages(chosen, rejected)
        return [{"role": "user", "content": prompt}], chosen, rejected
    if prompt == chosen[: len(prompt)] == rejected[: len(prompt)]:
        return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
    return prompt, chosen, rejected


def _with_system(system: Any, prompt: Text, chosen: Text, rejected: Text) -> Pair:
    """Strings become messages, since only those have a place for the system text."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    content = "" if system is None else _string(system)
    if content.strip() and not (prompt and prompt[0]["role"] == "system"):
        prompt = [{"role": "system", "content": content}, *prompt]
    return prompt, chosen, rejected


def _split_strings(chosen: str, rejected: str) -> Pair:
    """HH style: the prompt ends with the last "Assistant:" that both sides share."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((n for n, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    end = chosen.rfind(_HH_ANSWER, 0, shared) + len(_HH_ANSWER)
    if end < len(_HH_ANSWER):
        raise BadRow("no_shared_prompt")
    for turns in (_HH_TURN.findall(chosen), _HH_TURN.findall(rejected)):
        # One speaker twice in a row: words of the other one hide in an answer, and would be scored.
        if turns[-1] != "Assistant" or any(a == b for a, b in pairwise(turns)):
            raise BadRow("wrong_roles")
    return chosen[:end], chosen[end:], rejected[end:]


def _split_messages(chosen: list[dict[str, str]], rejected: list[dict[str, str]]) -> Pair:
    """The prompt is what both sides share, up to an assistant turn on both."""
    end = 0
    for n, (left, right) in enumerate(zip(chosen, rejected, strict=False)):
        if left["role"] == right["role"] == "assistant":
            end = n
        if left != right:
            break
    if end == 0:
        raise BadRow("no_shared_prompt")
    return chosen[:end], chosen[end:], rejected[end:]


def _check(prompt: Text, chosen: Text, rejected: Text) -> None:
    question = prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt[-1:])
    if not question.strip():
        raise BadRow("empty_prompt")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        texts = [side] if isinstance(side, str) else [m["content"] for m in side if m["role"] == "assistant"]
        if not side or not all(text.strip() for text in texts):
            raise BadRow(f"empty_{name}")
    if not isinstance(prompt, str):
        ends = {message["role"] for side in (chosen, rejected) for message in (side[0], side[-1])}
        if prompt[-1]["role"] == "assistant" or ends != {"assistant"}:
            raise BadRow("wrong_roles")
    if chosen == rejected:
        raise BadRow("identical")
