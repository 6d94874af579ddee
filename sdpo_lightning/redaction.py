"""Rank 0: tokens, keys and passwords out of what is written or said."""

from __future__ import annotations

import logging
import os
import re
from typing import Any

HIDDEN = "***"

_WORDS = r"token|secret|password|passwd|credentials?|(?:api|access|secret|private|auth)_?key"
# `pad_token` and its like name words of a vocabulary; `tokenizer` and `batch_tokens` don't end so.
_NAMES = re.compile(rf"(?:^|[_.-])(?<!pad_)(?<!eos_)(?<!bos_)(?<!unk_)(?<!mask_)(?:{_WORDS})$", re.IGNORECASE)
# Of the Hugging Face hub, OpenAI and its like, GitHub, AWS; and `user:password@` in an address.
_SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bAKIA[0-9A-Z]{16}\b"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_ASSIGNED = re.compile(rf"((?:{_WORDS})['\"]?\s*[=:]\s*['\"]?)([^\s'\",}}]{{4,}})", re.IGNORECASE)
_SHORTEST = 8


def hide_in_text(text: str) -> str:
    """The text with whatever looks like a secret, or is one of the environment's, replaced by `***`."""
    for value in _of_environment():
        text = text.replace(value, HIDDEN)
    return _ASSIGNED.sub(rf"\1{HIDDEN}", _SHAPES.sub(HIDDEN, text))


def hide_in_config(value: Any, name: str = "") -> Any:
    """A copy of plain values in which strings under the names of secrets, or of their form, are replaced by `***`.

    Args:
        value: dictionaries, lists and scalars.
        name: the key under which it stands.
    """
    if isinstance(value, dict):
        return {key: hide_in_config(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [hide_in_config(inner, name) for inner in value]
    if not isinstance(value, str) or not value:
        return value
    if _NAMES.search(name):
        return HIDDEN
    for secret in _of_environment():
        value = value.replace(secret, HIDDEN)
    return _SHAPES.sub(HIDDEN, value)


def _of_environment() -> list[str]:
    found = {value for name, value in os.environ.items() if _NAMES.search(name) and len(value) >= _SHORTEST}
    return sorted(found, key=len, reverse=True)


class HidesSecrets(logging.Filter):
    """Lets every line of a log through, without its secrets."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Put the clean text into the record."""
        record.msg, record.args = hide_in_text(record.getMessage()), None
        return True
