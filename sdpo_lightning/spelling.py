"""Rank 0: did you mean."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What to add to an error about an unknown word; empty where nothing known is like it.

    Args:
        word: as it was given.
        known: what would have been right.
    """
    close = get_close_matches(word, sorted(set(known)), n=1)
    return f"; did you mean `{close[0]}`?" if close else ""
