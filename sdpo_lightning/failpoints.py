"""Rank 0: named points at which a test ends the process, as a kill or a power cut would."""

from __future__ import annotations

import os

_passed: dict[str, int] = {}


def failpoint(name: str) -> None:
    """Exit with 137, without any clean-up, where `SDPO_FAILPOINT` is `name:n` and rank 0 passes here the n-th time."""
    wanted, _, number = os.environ.get("SDPO_FAILPOINT", "").partition(":")
    if wanted != name or os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) != "0":
        return
    _passed[name] = _passed.get(name, 0) + 1
    if _passed[name] == int(number or 1):
        end()


def end() -> None:
    """What a reached failpoint does; a test of several ranks puts another death here."""
    os._exit(137)
