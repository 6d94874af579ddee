"""Rank 4: what a terminal is shown beside Lightning's bar, in its manner: rich's where it is that, else plain text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from tqdm import tqdm

from sdpo_lightning.bars import OpenBar


def is_terminal() -> bool:
    """Whether someone watches stdout, on a terminal or in a notebook."""
    return sys.stdout.isatty() or "ipykernel" in sys.modules


def shown_bar(trainer: pl.Trainer) -> ProgressBar | None:
    """Lightning's bar, where there is one that shows on this rank."""
    bar = trainer.progress_bar_callback
    shows = isinstance(bar, RichProgressBar | TQDMProgressBar) and bar.is_enabled
    return bar if shows and trainer.is_global_zero and is_terminal() else None


def bar_opener(trainer: pl.Trainer) -> OpenBar | None:
    """How bars of our own are shown; None shows none."""
    bar = shown_bar(trainer)
    if bar is None:
        return None
    return _rich_opener(bar) if isinstance(bar, RichProgressBar) else _plain_bar


@contextmanager
def _plain_bar(title: str, total: int | None) -> Iterator[Callable[[], None]]:
    # Where Lightning's bar of this kind is.
    with tqdm(total=total, desc=title, leave=False, file=sys.stdout, dynamic_ncols=True) as bar:
        yield lambda: _advance(bar)


def _advance(bar: tqdm) -> None:
    bar.update(1)


def _rich_opener(bar: RichProgressBar) -> OpenBar:
    @contextmanager
    def open_bar(title: str, total: int | None) -> Iterator[Callable[[], None]]:
        from rich.progress import Progress

        shown = bar.progress
        if shown is not None and shown.live.is_started:
            # A line of Lightning's own display: two displays would write over each other.
            task = shown.add_task(title, total=total)
            try:
                yield lambda: shown.advance(task)
            finally:
                shown.remove_task(task)
            return
        with Progress(transient=True) as progress:
            own = progress.add_task(title, total=total)
            yield lambda: progress.advance(own)

    return open_bar


def print_table(bar: ProgressBar, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Show a table above the bar.

    Args:
        bar: the one that shows.
        title: above the table.
        heads: of the columns; the first is of names.
        rows: cells.
    """
    if not isinstance(bar, RichProgressBar):
        # Not the bar's own `print`, which is silent once its pass has ended.
        tqdm.write("\n".join([title, *plain_table(heads, rows)]), file=sys.stdout)
        return
    from rich import get_console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    get_console().print(table)


def plain_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, names on the left and numbers on the right."""
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()

    return [line(heads), *map(line, rows)]
