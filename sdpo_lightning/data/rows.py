"""Rank 1: one record as it stands in a file -> its pairs in canonical form, or the reason to drop it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from sdpo_lightning.data.messages import RESERVED, BadRow, Message, Text, checked_string, from_json, text_of, to_json
from sdpo_lightning.data.rated import (
    MOST_ANSWERS,
    NUMBERS,
    VERDICTS,
    PairRule,
    choose_pairs,
    columns_of,
    number_of,
    pair_number,
    scores_of,
    values_of,
)

Pair = tuple[Text, Text, Text]  # prompt, chosen, rejected: all strings or all lists of messages

# Found without being asked for, as TRL does it.
_EXTRAS = ("tools", "chat_template_kwargs")
_PROMPTS = ("prompt", "conversations")
# Without its pictures a pair would teach something else.
_IMAGES = ("images", "image")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ANSWER = "\n\nAssistant:"

# Bits of a pair id: source, held-out file, pair within its row, row.
VAL_FIRST_ROW = 1 << 39
_PAIR_SHIFT = 32


def row_number(pair_id: int) -> int:
    """The row, counted from 1, of its file."""
    return (pair_id & ((1 << _PAIR_SHIFT) - 1)) + 1


def pair_id_of(first_id: int, row: int, number: int) -> int:
    """Id of a pair, unique over all sources.

    Args:
        first_id: of the file: the source's place << 40, + `VAL_FIRST_ROW` for a held-out file.
        row: its row in the file, from 0, before any filter.
        number: of the pair within its row; 0 where a row is a pair.
    """
    return first_id + (number << _PAIR_SHIFT) + row


@dataclass(frozen=True)
class Form:
    """How the pairs of a source stand in its rows.

    Attributes:
        columns: canonical name -> column, as the user gave them.
        system_prompt: for rows without a system turn of their own.
        rated_pairs: which pairs a list of rated answers makes.
        min_gap: least difference of the scores of such a pair.
    """

    columns: dict[str, str]
    system_prompt: str | None = None
    rated_pairs: PairRule = "best_worst"
    min_gap: float = 0.0

    @property
    def verdict(self) -> str | None:
        """Which column rates the answers; None where rows hold a chosen and a rejected one."""
        return next((name for name in VERDICTS if name in self.columns), None)

    @property
    def prompts(self) -> Sequence[str]:
        """Columns that may hold the prompt, the first one that does counts."""
        return (self.columns["prompt"],) if "prompt" in self.columns else _PROMPTS

    def column(self, name: str) -> str:
        """The column of a canonical name."""
        return self.columns.get(name, name)

    def needed(self) -> dict[str, list[str]]:
        """Canonical name -> columns without which there is no pair; the prompt may be implicit."""
        if self.verdict is not None:
            rated = {name: columns_of(self.columns[name]) for name in ("answers", self.verdict)}
            return {"prompt": list(self.prompts[:1]), **rated} | self._given()
        return {name: [self.column(name)] for name in ("chosen", "rejected")} | self._given()

    def _given(self) -> dict[str, list[str]]:
        one = {name: [column] for name, column in self.columns.items() if name not in ("answers", *VERDICTS)}
        if "pair_score" in one:
            one["pair_score"] = columns_of(self.columns["pair_score"])
        # A system text of each row has its place in front of an explicit prompt only.
        return one | ({"prompt": list(self.prompts[:1])} if "system" in self.columns else {})

    def numbers(self) -> list[str]:
        """Those of `NUMBERS` that a pair comes with; that of a rated pair is the gap of its ratings."""
        return [name for name in NUMBERS if name in self.columns or (name == "pair_score" and self.verdict is not None)]

    def wanted(self) -> set[str]:
        """Columns to read."""
        extras = [self.column(name) for name in _EXTRAS]
        return {*self.prompts, *extras, *_IMAGES, *self._columns()}

    def _columns(self) -> set[str]:
        return {column for columns in self.needed().values() for column in columns}

    def has_images(self, record: dict[str, Any]) -> bool:
        """Whether a record holds pictures, in columns that aren't read as text."""
        return any(record.get(name) for name in _IMAGES if name not in self._columns())


class Row(NamedTuple):
    """One pair in canonical form.

    Attributes:
        prompt: a string, or messages.
        chosen: in the same form.
        rejected: in the same form.
        number: of the pair within its record.
        extras: JSON of `tools` and `chat_template_kwargs` of a dialogue, "" without any.
        numbers: `pair_score` and `prompt_score`, None where the source has none.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    number: int = 0
    extras: str = ""
    numbers: tuple[float | None, float | None] = (None, None)


def canonical_rows(record: dict[str, Any] | str, form: Form, explicit: bool) -> list[Row | str]:
    """Bring one record into canonical form.

    Args:
        record: the needed columns, or the reason why there are none.
        form: how the source's rows are read.
        explicit: whether the source has a prompt column; else the prompt is what both sides share.

    Returns:
        Its pairs; of a list of rated answers perhaps several, or reasons for which single ones are dropped.

    Raises:
        BadRow: with the reason to drop it.
    """
    if isinstance(record, str):
        raise BadRow(record)
    if form.has_images(record):
        raise BadRow("has_images")
    prompt = next((record[name] for name in form.prompts if record.get(name) is not None), None)
    if prompt is None and (explicit or form.verdict is not None):
        raise BadRow("missing_prompt")
    if form.verdict is not None:
        return _rated(record, form, text_of(prompt))
    values = {name: record.get(form.column(name)) for name in ("chosen", "rejected")}
    for name, value in values.items():
        if value is None:
            raise BadRow(f"missing_{name}")
    chosen, rejected = text_of(values["chosen"]), text_of(values["rejected"])
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("wrong_type")
    if explicit:
        pair = _explicit(text_of(prompt), chosen, rejected)
    else:
        pair = _shared(chosen, rejected)
    pair = _with_system(record, form, explicit, *pair)
    _check(*pair)
    return [Row(*pair, 0, "" if isinstance(pair[0], str) else _extras(record, form), _numbers(record, form))]


def _numbers(record: dict[str, Any], form: Form) -> tuple[float | None, float | None]:
    """The numbers of a row's columns; of two columns the first less the second."""
    found: list[float | None] = []
    for name in NUMBERS:
        columns = columns_of(form.columns[name]) if name in form.columns else []
        values = [value for column in columns if (value := number_of(record.get(column))) is not None]
        if len(values) < len(columns):
            raise BadRow(f"missing_{name}")
        found.append(values[0] - sum(values[1:]) if values else None)
    return found[0], found[1]


def _rated(record: dict[str, Any], form: Form, prompt: Text) -> list[Row | str]:
    """Pairs of a list of answers."""
    verdict = form.verdict
    assert verdict is not None
    answers = values_of(record, form.columns["answers"])
    if answers is None or len(answers) < 2:
        raise BadRow("missing_answers")
    if len(answers) > MOST_ANSWERS:
        raise BadRow("too_many_answers")
    spec = form.columns[verdict]
    values = values_of(record, spec) if verdict in ("scores", "ranks") else record.get(spec)
    scores = scores_of(verdict, values, len(answers))
    if scores is None:
        raise BadRow("unrated")
    prompt_score = _numbers(record, form)[1]
    texts = [None if value is None else _answer(text_of(value), prompt) for value in answers]
    rated = [None if text is None else score for text, score in zip(texts, scores, strict=True)]
    rows: list[Row | str] = []
    for better, worse in choose_pairs(rated, form.rated_pairs, form.min_gap):
        chosen, rejected = texts[better], texts[worse]
        assert chosen is not None and rejected is not None, "an answer that isn't there has no score"
        try:
            pair = _with_system(record, form, True, *_explicit(prompt, chosen, rejected))
            _check(*pair)
            extras = "" if isinstance(pair[0], str) else _extras(record, form)
            gap = (rated[better] or 0.0) - (rated[worse] or 0.0)
            rows.append(Row(*pair, pair_number(better, worse), extras, (gap, prompt_score)))
        except BadRow as bad:
            rows.append(str(bad))
    if not rows:
        raise BadRow("tied" if sum(score is not None for score in rated) > 1 else "unrated")
    return rows


def _answer(text: Text, prompt: Text) -> Text:
    """An answer in the form of its prompt."""
    if isinstance(text, str) and not isinstance(prompt, str):
        return [{"role": "assistant", "content": text}]
    return text


def _extras(record: dict[str, Any], form: Form) -> str:
    found: dict[str, Any] = {}
    for name, kind in zip(_EXTRAS, (list, dict), strict=True):
        value = record.get(form.column(name))
        if isinstance(value, str):
            value = from_json(value) if value.strip() else None
        if not value:  # some templates announce tools even where the list is empty
            continue
        if not isinstance(value, kind) or (kind is dict and RESERVED & value.keys()):
            raise BadRow("wrong_type")
        found[name] = value
    return to_json(found) if found else ""


def _explicit(prompt: Text, chosen: Text, rejected: Text) -> Pair:
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("wrong_type")
    if isinstance(chosen, str) or isinstance(rejected, str):
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


def _with_system(record: dict[str, Any], form: Form, explicit: bool, *pair: Text) -> Pair:
    """Strings become messages, since only those have a place for the system text."""
    prompt, chosen, rejected = pair
    if "system" not in form.columns and form.system_prompt is None:
        return prompt, chosen, rejected
    if isinstance(prompt, str):
        if not explicit:  # the speakers stand in the text
            raise BadRow("no_place_for_system")
        prompt = [{"role": "user", "content": prompt}]
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    own = record.get(form.columns["system"]) if "system" in form.columns else None
    content = "" if own is None else checked_string(own)
    content = content if content.strip() else form.system_prompt or ""
    if content.strip() and not (prompt and prompt[0]["role"] == "system"):
        prompt = [{"role": "system", "content": content}, *prompt]
    return prompt, chosen, rejected


def _shared(chosen: Text, rejected: Text) -> Pair:
    """The prompt is what both sides, of one form, begin with."""
    if isinstance(chosen, str):
        assert isinstance(rejected, str)
        return _split_strings(chosen, rejected)
    assert not isinstance(rejected, str)
    return _split_messages(chosen, rejected)


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


def _split_messages(chosen: list[Message], rejected: list[Message]) -> Pair:
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


def _says(message: Message) -> bool:
    return bool((message["content"] or "").strip()) or "tool_calls" in message


def _check(prompt: Text, chosen: Text, rejected: Text) -> None:
    question = prompt if isinstance(prompt, str) else "".join(message["content"] or "" for message in prompt[-1:])
    if not question.strip():
        raise BadRow("empty_prompt")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(side, str):
            empty = not side.strip()
        else:
            empty = not side or not all(_says(message) for message in side if message["role"] == "assistant")
        if empty:
            raise BadRow(f"empty_{name}")
    if not isinstance(prompt, str):
        sides = [side for side in (chosen, rejected) if not isinstance(side, str)]
        ends = {message["role"] for side in sides for message in (side[0], side[-1])}
        if prompt[-1]["role"] == "assistant" or ends != {"assistant"}:
            raise BadRow("wrong_roles")
    if chosen == rejected:
        raise BadRow("identical")
