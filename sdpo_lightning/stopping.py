"""Rank 0: SIGTERM and SIGINT, which end a run at its next step boundary."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """The first signal asks, the second ends the process at once.

    Attributes:
        signal: what was received; None until then.
        deferred: something will stop at the next step boundary; else the first signal stops at once too.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.deferred = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within this context the signals are heard; only in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        self.signal, self.deferred = None, False
        self.take_over()
        try:
            yield
        finally:
            self.deferred = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def take_over(self) -> None:
        """Install the handlers, also over those that Lightning has installed meanwhile."""
        for number in _SIGNALS:
            signal.signal(number, self._hear)

    def is_heard(self) -> bool:
        """Whether our handlers are in place: within `listening`, unless somebody has put others over them."""
        return signal.getsignal(signal.SIGINT) == self._hear

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        if not self.deferred:
            self.leave()
        log.warning("%s: stopping at the next step; once more stops at once", signal.Signals(number).name)

    def leave_if_asked(self) -> None:
        """Stop between two batches of a pass that keeps nothing.

        Raises:
            SystemExit: a signal was received.
        """
        if self.signal is not None:
            self.leave_a_pass()

    def hear_of(self, signals: Iterable[int | None]) -> None:
        """Take what another rank has received for one's own.

        Args:
            signals: of all ranks.
        """
        if self.signal is None:
            self.signal = next((number for number in signals if number is not None), None)

    def leave_a_pass(self) -> NoReturn:
        """Exit where nothing is to be kept.

        Raises:
            SystemExit: always.
        """
        log.warning("stopped by a signal in a pass over pairs; start the same command to go on")
        self.leave()

    def leave(self) -> NoReturn:
        """Exit as a shell expects it: 143 after SIGTERM, 130 after SIGINT.

        Raises:
            SystemExit: always.
        """
        raise SystemExit(128 + (self.signal or signal.SIGTERM))


STOP = StopRequest()
