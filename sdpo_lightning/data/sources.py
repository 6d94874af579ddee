"""Rank 2: a file, a folder or a hub set -> canonical preference rows, bad rows counted by reason.

The walk: read the needed columns of the first `limit` rows -> leave out what `filter` doesn't want -> bring each row
into one form or find why it can't be -> Arrow, a chunk at a time -> check that the columns exist -> draw the `sample`.
A bad row is dropped, a bad file is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import datasets

from sdpo_lightning.data.declaration import PreferenceSource
from sdpo_lightning.data.messages import BadRow, Text, is_plain, pack
from sdpo_lightning.data.rated import CANONICAL, NUMBERS
from sdpo_lightning.data.records import Origin, Table, open_table
from sdpo_lightning.data.rows import Form, Row, canonical_rows, pair_id_of, row_number
from sdpo_lightning.data.selection import Condition, passes, sampled
from sdpo_lightning.data.tables import TableWriter, copy_rows
from sdpo_lightning.types import ConfigurationError

log = logging.getLogger(__name__)

Note = tuple[int, str]  # level and text of a log line


@dataclass
class SourceRows:
    """The rows of one source that can be trained on, and what became of the others."""

    rows: datasets.Dataset
    """`pair_id` (int64), `prompt`, `chosen`, `rejected`: all strings, or all lists of `{role, content}`. Where any
    message or row has more: packed messages (`messages.pack`) and a column `extras`. Perhaps `pair_score` and
    `prompt_score` (float64)."""
    dropped: dict[str, int]
    """Reason -> number of rows dropped for it."""
    examples: dict[str, list[str]]
    """Reason -> the first three such rows as `file:number`, from 1 (of a text file the line's number)."""
    total: int
    """Rows read, the dropped ones included; of rated lists pairs."""
    conversational: bool
    """Whether the rows are lists of messages."""
    notes: list[Note]
    """What the log is to say of the rows that are not used."""
    left_out: dict[str, int] = field(default_factory=dict)
    """`filter` and `sample` -> rows or pairs that the user didn't want."""


def prompt_texts(source: PreferenceSource, source_index: int = 0) -> Iterator[tuple[int, list[str]]]:
    """Row from 1 and the texts of its prompt, one a message, of each row that can be trained on.

    Args:
        source: what to read.
        source_index: the source's place in `data.sources`.
    """
    rows = load_source(source, source_index).rows
    for start in range(0, len(rows), 1000):
        part = rows[start : start + 1000]
        for pair_id, prompt in zip(part["pair_id"], part["prompt"], strict=True):
            texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
            yield row_number(pair_id), texts


def load_source(
    source: PreferenceSource,
    source_index: int = 0,
    path: str | None = None,
    on_bad_row: Literal["drop", "error"] = "drop",
    first_row: int = 0,
) -> SourceRows:
    """Read one source into memory and log what was dropped.

    Args:
        source: what to read.
        source_index: the source's place in `data.sources`; bits 40 and up of each `pair_id`.
        path: read this in place of `source.path`, for `source.val_path`.
        on_bad_row: whether a row that can't be used is dropped and counted, or stops the run.
        first_row: added to the row numbers in `pair_id`, so that ids of a second file don't collide.

    Returns:
        The rows. `pair_id` is that of `rows.pair_id_of`; its row n counts the rows of the file from 0, before any is
        left out or dropped; blank lines aren't rows.

    Raises:
        ConfigurationError: nothing readable at the path, a column that isn't there, no row left, or, with
            `on_bad_row="error"`, the first bad row.
    """
    loaded = read_source(source, source_index, path, on_bad_row, first_row)
    for level, text in loaded.notes:
        log.log(level, "%s", text)
    return loaded


def read_source(
    source: PreferenceSource,
    source_index: int,
    path: str | None,
    on_bad_row: Literal["drop", "error"],
    first_row: int,
    into: Path | None = None,
) -> SourceRows:
    """`load_source` without its log lines, through an Arrow file.

    Args:
        source: as for `load_source`.
        source_index: as for `load_source`.
        path: as for `load_source`.
        on_bad_row: as for `load_source`.
        first_row: as for `load_source`.
        into: file for the rows, memory-mapped afterwards; None keeps them in memory.

    Raises:
        ConfigurationError: as for `load_source`.
    """
    origin, form = origin_of(source, path), form_of(source)
    table = open_table(origin, form.wanted() | set(source.filter or {}))
    draws = source.sample is not None and path is None
    everything = into.with_suffix(".all") if into is not None and draws else into
    kept = _Conversion(table, form, source.filter or {}, source_index << 40 | first_row).run(everything)
    if not kept.total:
        _check_columns(origin, form, source, list(table.found))
        if not kept.filtered:
            raise origin.error("is empty (0 rows)", "expected one preference pair a row")
        raise origin.error(f"has no row that passes, of {kept.filtered}", "expected some", key="filter")
    _check_columns(origin, form, source, list(table.found))
    if on_bad_row == "error" and kept.dropped:
        reason, (number, *_) = min(kept.places.items(), key=lambda item: item[1])
        at = f"has a bad row at {origin.path}:{number}: {reason}"
        raise origin.error(at, "`data.on_bad_row: error` allows none")
    notes, left_out = _notes(origin, kept), {}
    examples = {reason: [f"{origin.path}:{n}" for n in numbers] for reason, numbers in kept.places.items()}
    assert kept.writer is not None, "a source without rows is refused above"
    rows = kept.writer.finish()
    if kept.filtered:
        left_out["filter"] = kept.filtered
    if draws:
        assert source.sample is not None
        whole, count = rows, len(rows)
        rows = copy_rows(whole, sampled(count, source.sample, source.sample_seed), into)
        left_out["sample"] = count - len(rows)
        if everything is not None:
            del whole
            everything.unlink()
        notes += _sample_notes(origin, source, count)
    if left_out:
        text = ", ".join(f"{count} by `{key}`" for key, count in left_out.items())
        notes.append((logging.INFO, f"source {origin.name!r}: left out {text}"))
    return SourceRows(rows, kept.dropped, examples, kept.total, kept.conversational, notes, left_out)


def form_of(source: PreferenceSource) -> Form:
    """How the pairs of a source stand in its rows."""
    return Form(source.columns or {}, source.system_prompt, source.rated_pairs, source.min_gap)


def _sample_notes(origin: Origin, source: PreferenceSource, count: int) -> list[Note]:
    if not isinstance(source.sample, int) or source.sample <= count:
        return []
    found = f"{origin.setting('sample')} is {source.sample}, but there are {count} pairs: all are taken"
    return [(logging.WARNING, f"source {origin.name!r}: {found}")]


def origin_of(source: PreferenceSource, path: str | None = None) -> Origin:
    """Where the rows of `source.path` come from, or those of `path` in its place."""
    key = "path" if path is None else "val_path"
    where, split = path or source.path, source.split
    assert where is not None and split is not None, "a source fills them in when it is made"
    return Origin(source.name, where, key, split, source.limit)


def _notes(origin: Origin, kept: _Kept) -> list[Note]:
    """Lines about the dropped rows; refuses a source that has no others."""
    counts = kept.dropped.items()
    text = ", ".join(f"{count} {reason} (first at {kept.places[reason][0]})" for reason, count in counts)
    name, count = origin.name, sum(kept.dropped.values())
    if count == kept.total:
        keys = f"{origin.setting(origin.key)} or {origin.setting('columns')}"
        found = f"source {name!r}: 0 of {kept.total} rows left of {origin.path!r}: {text}"
        raise ConfigurationError(f"{found}; change {keys}")
    if not count:
        return []
    level = logging.WARNING if count > 0.01 * kept.total else logging.INFO
    return [(level, f"source {name!r}: {count} of {kept.total} rows of {origin.path!r} dropped: {text}")]


class _Kept:
    """Good rows on their way into Arrow, bad ones counted by reason."""

    def __init__(self, into: Path | None, packed: bool, numbers: Sequence[str]) -> None:
        self._into = into
        self._numbers = numbers
        self.packed = packed
        self.writer: TableWriter | None = None
        self.conversational = False
        self.total = 0
        self.filtered = 0
        self.dropped: dict[str, int] = {}
        self.places: dict[str, list[int]] = {}

    def add(self, pair_id: int, row: Row) -> None:
        """Keep a row; the first one decides the form.

        Raises:
            BadRow: it has the other one.
            _NeedsPacking: its messages have more than the columns hold.
        """
        conversational = not isinstance(row.prompt, str)
        if self.writer is not None and conversational != self.conversational:
            raise BadRow("other_form")
        texts: tuple[Text, ...] = (row.prompt, row.chosen, row.rejected)
        if self.packed and conversational:
            texts = tuple(map(pack, texts))
        elif row.extras or not all(map(is_plain, texts)):
            raise _NeedsPacking
        if self.writer is None:
            self._open(conversational)
        assert self.writer is not None
        numbers = (row.numbers[NUMBERS.index(name)] for name in self._numbers)
        self.writer.add((pair_id, *texts, *([row.extras] if self.packed else []), *numbers))

    def _open(self, conversational: bool) -> None:
        self.conversational = conversational
        string = datasets.Value("string")
        keys = ("role", "content", "fields") if self.packed else ("role", "content")
        text = [dict.fromkeys(keys, string)] if conversational else string
        features = {"pair_id": datasets.Value("int64")} | dict.fromkeys(CANONICAL[:3], text)
        if self.packed:
            features["extras"] = string
        features |= dict.fromkeys(self._numbers, datasets.Value("float64"))
        self.writer = TableWriter(datasets.Features(features), self._into)

    def drop(self, reason: str, number: int) -> None:
        """Count a row; the first three places are kept."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        places = self.places.setdefault(reason, [])
        if len(places) < 3:
            places.append(number)


class _NeedsPacking(Exception):
    """A row with more than role and content, after rows without."""


@dataclass
class _Conversion:
    """All rows of a table in canonical form. What a late row shows of all of them makes it begin again."""

    table: Table
    form: Form
    filter: Mapping[str, Condition]
    first_id: int
    explicit: bool = False
    packed: bool = False

    def run(self, into: Path | None) -> _Kept:
        """Convert.

        Args:
            into: file for the rows; None keeps them in memory.
        """
        while True:
            kept = _Kept(into, self.packed, self.form.numbers())
            try:
                if self._fill(kept):
                    return kept
            except _NeedsPacking:
                self.packed = True
            if kept.writer is not None:
                kept.writer.close()

    def _fill(self, kept: _Kept) -> bool:
        for row, (number, record) in enumerate(self.table.records()):
            if not self.explicit and any(name in self.table.found for name in self.form.prompts):
                # A prompt in any row makes it a column of all: the rows before this one were read without.
                self.explicit = True
                if row > 0:
                    return False
            if self.filter and isinstance(record, dict) and not passes(record, self.filter):
                kept.filtered += 1
                continue
            try:
                pairs = canonical_rows(record, self.form, self.explicit)
            except BadRow as bad:
                pairs = [str(bad)]
            for pair in pairs:
                kept.total += 1
                try:
                    if isinstance(pair, str):
                        raise BadRow(pair)
                    kept.add(pair_id_of(self.first_id, row, pair.number), pair)
                except BadRow as bad:
                    kept.drop(str(bad), number)
        return True


def _check_columns(origin: Origin, form: Form, source: PreferenceSource, found: list[str]) -> None:
    """Refuse columns that stand in no row."""
    needed = form.needed()
    missing = [column for name in CANONICAL for column in needed.get(name, ()) if column not in found]
    # Without any column no row was an object: those are counted by reason.
    if not found:
        return
    listed = f"expected one of {found[:20]}" + (" and more" if len(found) > 20 else "")
    if missing:
        raise origin.error(f"has unknown column {', '.join(map(repr, missing))}", listed, key="columns")
    if missing := [column for column in source.filter or {} if column not in found]:
        raise origin.error(f"has unknown column {', '.join(map(repr, missing))}", listed, key="filter")
