"""Rank 1: do training prompts stand in an evaluation set? Whole, or by 13 words in a row (arXiv 2005.14165, app. C)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdpo_lightning.types import ConfigurationError

WORDS_IN_A_ROW = 13


@dataclass
class Overlap:
    """Rows whose prompt stands in an evaluation set.

    Attributes:
        exact: the whole of it, case and punctuation aside.
        partial: only 13 words in a row or more.
    """

    exact: list[int] = field(default_factory=list)
    partial: list[int] = field(default_factory=list)


class EvaluationTexts:
    """The texts of an evaluation set, to look prompts up in.

    Args:
        texts: questions, answers, whatever it holds.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._whole: set[int] = set()
        self._runs: set[int] = set()
        for text in texts:
            words = _words(text)
            if words:
                self._whole.add(hash(tuple(words)))
                self._runs.update(_runs(words))

    def find(self, prompts: Iterable[tuple[int, Sequence[str]]]) -> Overlap:
        """The prompts that stand here.

        Args:
            prompts: number of the row, and the texts of its prompt (one a message).
        """
        found = Overlap()
        for row, texts in prompts:
            parts = [_words(text) for text in texts]
            if any(hash(tuple(words)) in self._whole for words in parts):
                found.exact.append(row)
            elif any(run in self._runs for words in parts for run in _runs(words)):
                found.partial.append(row)
        return found


def read_evaluation(path: str) -> EvaluationTexts:
    """Read a .jsonl file, of which every string counts, or a text file of one text a line.

    Raises:
        ConfigurationError: it can't be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        if path.endswith(".jsonl"):
            return EvaluationTexts(text for line in lines if line.strip() for text in _strings(json.loads(line)))
        return EvaluationTexts(lines)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(
            f"`--benchmarks`: {path!r} can't be read ({reason}), expected .jsonl or a text a line"
        ) from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _runs(words: Sequence[str]) -> Iterator[int]:
    return (hash(tuple(words[i : i + WORDS_IN_A_ROW])) for i in range(len(words) - WORDS_IN_A_ROW + 1))
