"""Rank 0: what one process does for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


def is_first() -> bool:
    """Whether this is rank 0, or the only process."""
    return not dist.is_initialized() or dist.get_rank() == 0


def from_first_rank(make: Callable[[], Result]) -> Result:
    """What rank 0 makes, on every rank: read once, and no shared file system is needed.

    Args:
        make: called on rank 0 only; its result goes over the wire, so keep it small.

    Raises:
        Exception: what `make` raised, on all ranks: none waits for a rank that has given up.
    """
    if not dist.is_initialized():
        return make()
    told: list[tuple[Result | None, Exception | None]] = [(None, None)]
    if is_first():
        try:
            told = [(make(), None)]
        except Exception as error:  # noqa: BLE001
            told = [(None, error)]
    dist.broadcast_object_list(told)
    result, error = told[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
