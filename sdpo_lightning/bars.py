"""Rank 0: progress of passes that Lightning has no bar for. Off until someone says how a bar is shown."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sized
from contextlib import AbstractContextManager
from typing import TypeVar

Item = TypeVar("Item")
# Title and number of items (None where that isn't known) -> an open bar; what it gives is called after each item.
OpenBar = Callable[[str, int | None], AbstractContextManager[Callable[[], None]]]


class Bars:
    """Where passes over many items say how far they are."""

    def __init__(self) -> None:
        self._open: OpenBar | None = None

    def use(self, open_bar: OpenBar | None) -> None:
        """Show bars from now on.

        Args:
            open_bar: opens one; None shows none.
        """
        self._open = open_bar

    def track(self, items: Iterable[Item], title: str) -> Generator[Item, None, None]:
        """The items, with a bar that moves after each.

        Args:
            items: each is waited for.
            title: of the bar.
        """
        if self._open is None:
            yield from items
            return
        with self._open(title, len(items) if isinstance(items, Sized) else None) as advance:
            for item in items:
                yield item
                advance()


BARS = Bars()
