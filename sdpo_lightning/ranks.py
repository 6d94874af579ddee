"""Rank 0: what one process does for all, and what several do side by side."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch.distributed as dist

Result = TypeVar("Result")

# Between two questions whether the others are done; far below the time-out of a collective.
_FIRST_WAIT, _LONGEST_WAIT = 0.02, 2.0


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
    told: list[tuple[Result | None, Exception | SystemExit | None]] = [(None, None)]
    if is_first():
        try:
            told = [(make(), None)]
        except Exception as error:  # noqa: BLE001
            told = [(None, _portable(error))]
    dist.broadcast_object_list(told)
    result, failure = told[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def together(
    make: Callable[[], Result] | None, between: Callable[[], object] | None = None
) -> list[Result | None]:
    """What each rank makes, on every rank, however long it takes and whoever takes longest.

    The ranks ask each other every few seconds, so no collective ever waits long. Where there are several processes,
    `make` runs in a thread beside them.

    Args:
        make: of this rank; its result goes over the wire, so keep it small. None where this rank only waits.
        between: called on every rank after each question, where there are several; may be a collective.

    Returns:
        The results by rank; None of a rank that only waited.

    Raises:
        Exception: what the first rank to fail raised, on all ranks and while the others are still at work; SystemExit
            too.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [make() if make is not None else None]
    work = _Work(make)
    wait = _FIRST_WAIT
    while True:
        states: list[_State[Result]] = [_State() for _ in range(dist.get_world_size())]
        dist.all_gather_object(states, work.state(wait))
        for state in states:
            if state.error is not None:
                raise state.error
        if all(state.done for state in states):
            return [state.result for state in states]
        if between is not None:
            between()
        wait = min(2 * wait, _LONGEST_WAIT)


def side_by_side(make: Callable[[], Result]) -> Result:
    """What this rank makes, once all ranks have made theirs.

    Args:
        make: called on every rank; its result stays here.

    Raises:
        Exception: what the first rank to fail raised, on all ranks.
    """
    made: list[Result] = []
    together(lambda: made.append(make()))
    return made[0]


@dataclass
class _State(Generic[Result]):
    done: bool = False
    result: Result | None = None
    error: Exception | SystemExit | None = None


class _Work(Generic[Result]):
    """A call in a thread, asked for its state now and then."""

    def __init__(self, make: Callable[[], Result] | None) -> None:
        self._make = make
        self._state: _State[Result] = _State(done=make is None)
        self._ended = threading.Event()
        # A process that has to stop because of another rank's error doesn't wait for its own work.
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            if self._make is not None:
                self._state = _State(True, self._make())
        except (Exception, SystemExit) as error:  # noqa: BLE001
            self._state = _State(True, error=_portable(error))
        finally:
            self._ended.set()

    def state(self, wait: float) -> _State[Result]:
        """The state after `wait` seconds, or as soon as the call ends."""
        self._ended.wait(wait)
        return self._state


def _portable(error: Exception | SystemExit) -> Exception | SystemExit:
    """The error, or its text where it can't go over the wire: else the other ranks would wait for it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def leave_group() -> None:
    """End a gloo group once the work is done: its threads can abort an interpreter that ends around them.

    Only after a success: a rank that failed can't count on the others. Lightning sees to NCCL's groups.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def from_every_rank(value: Result) -> list[Result]:
    """What each rank has, in the order of the ranks, on every rank. A collective.

    Args:
        value: small; it goes over the wire.
    """
    if not dist.is_initialized():
        return [value]
    values: list[Result] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
