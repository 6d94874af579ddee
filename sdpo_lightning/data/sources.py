"""Rank 2: a file, a folder or a hub set -> canonical preference rows, bad rows counted by reason.

The walk: read the needed columns of the first `limit` rows -> bring each row into one form or find why it can't
be -> Arrow, a chunk at a time -> check that the columns exist. A bad row is dropped, a bad file is refused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import datasets

from sdpo_lightning.data.records import Origin, Table, open_table
from sdpo_lightning.data.rows import CANONICAL, BadRow, Pair, canonical_pair
from sdpo_lightning.data.tables import TableWriter
from sdpo_lightning.types import ConfigurationError

log = logging.getLogger(__name__)

Note = tuple[int, str]  # level and text of a log line

# Held-out files count their rows from here, so that their ids never meet those of the training file.
VAL_FIRST_ROW = 1 << 39


@dataclass
class PreferenceSource:
    """One named preference data set.

    Raises:
        ConfigurationError: a name that can't be a folder's, a limit below 1, an unknown key in `columns`.
    """

    name: str
    """Names the stage and its folder: letters, digits, '.', '_' and '-', no leading '.'."""
    path: str
    """A .jsonl, .jsonl.gz or .parquet file, a `save_to_disk` folder, or the name of a hub data set."""
    split: str = "train"
    """Split of a hub data set or of a saved `DatasetDict`; files have none."""
    columns: dict[str, str] | None = None
    """prompt, chosen, rejected, system -> column of the file; `system` is read only if it stands here."""
    limit: int | None = None
    """Only the first N rows of the file (`path`, `val_path`), counted before any row is dropped."""
    val_path: str | None = None
    """Held-out pairs, in the same form and columns as `path`."""

    def __post_init__(self) -> None:
        key = f"`data.sources[{self.name}]"
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", self.name):
            raise ConfigurationError(
                f"`data.sources` holds the name {self.name!r}, expected letters, digits, '.', '_' and '-' "
                "without a leading '.': it becomes a folder's name"
            )
        if self.limit is not None and self.limit < 1:
            raise ConfigurationError(f"{key}.limit` is {self.limit}, expected at least 1 or null")
        if unknown := sorted(set(self.columns or {}) - set(CANONICAL)):
            raise ConfigurationError(f"{key}.columns` names {unknown}, known are {list(CANONICAL)}")


@dataclass
class SourceRows:
    """The rows of one source that can be trained on, and what became of the others."""

    rows: datasets.Dataset
    """`pair_id` (int64), `prompt`, `chosen`, `rejected`: all strings, or all lists of `{role, content}`."""
    dropped: dict[str, int]
    """Reason -> number of rows dropped for it."""
    examples: dict[str, list[str]]
    """Reason -> the first three such rows as `file:number`, from 1 (of a text file the line's number)."""
    total: int
    """Rows read, the dropped ones included."""
    conversational: bool
    """Whether the rows are lists of messages."""
    notes: list[Note]
    """What the log is to say of the dropped rows."""


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
            yield (pair_id & (VAL_FIRST_ROW - 1)) + 1, texts


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
        The rows. `pair_id` is `source_index << 40 | first_row + n`; n counts the rows of the file from 0,
        before any is dropped; blank lines aren't rows.

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
    origin = origin_of(source, path)
    columns = {name: name for name in CANONICAL[:3]} | (source.columns or {})
    table = open_table(origin, set(columns.values()))
    kept = _convert(table, columns, source_index << 40 | first_row, into)
    if not kept.total:
        raise origin.error("is empty (0 rows)", "expected one preference pair a row")
    _check_columns(origin, columns, source.columns or {}, list(table.found))
    if on_bad_row == "error" and kept.dropped:
        reason, (number, *_) = min(kept.places.items(), key=lambda item: item[1])
        at = f"has a bad row at {origin.path}:{number}: {reason}"
        raise origin.error(at, "`data.on_bad_row: error` allows none")
    notes = _notes(origin, kept)
    examples = {reason: [f"{origin.path}:{n}" for n in numbers] for reason, numbers in kept.places.items()}
    assert kept.writer is not None, "a source without rows is refused above"
    return SourceRows(kept.writer.finish(), kept.dropped, examples, kept.total, kept.conversational, notes)


def origin_of(source: PreferenceSource, path: str | None = None) -> Origin:
    """Where the rows of `source.path` come from, or those of `path` in its place."""
    key = "path" if path is None else "val_path"
    return Origin(source.name, path or source.path, key, source.split, source.limit)


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

    def __init__(self, into: Path | None) -> None:
        self._into = into
        self.writer: TableWriter | None = None
        self.conversational = False
        self.total = 0
        self.dropped: dict[str, int] = {}
        self.places: dict[str, list[int]] = {}

    def add(self, pair_id: int, pair: Pair) -> None:
        """Keep a row; the first one decides the form."""
        conversational = not isinstance(pair[0], str)
        if self.writer is None:
            self.conversational = conversational
            string = datasets.Value("string")
            text = [{"role": string, "content": string}] if conversational else string
            features = {"pair_id": datasets.Value("int64")} | dict.fromkeys(CANONICAL[:3], text)
            self.writer = TableWriter(datasets.Features(features), self._into)
        elif conversational != self.conversational:
            raise BadRow("other_form")
        self.writer.add((pair_id, *pair))

    def drop(self, reason: str, number: int) -> None:
        """Count a row; the first three places are kept."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        places = self.places.setdefault(reason, [])
        if len(places) < 3:
            places.append(number)


def _convert(table: Table, columns: dict[str, str], first_id: int, into: Path | None) -> _Kept:
    """All rows in canonical form."""
    explicit, again = False, True
    while again:
        kept, again = _Kept(into), False
        for row, (number, record) in enumerate(table.records()):
            if not explicit and columns["prompt"] in table.found:
                # A prompt in any row makes it a column of all: the rows before this one were read without.
                explicit, again = True, row > 0
                if again:
                    break
            kept.total += 1
            try:
                kept.add(first_id + row, canonical_pair(record, columns, explicit))
            except BadRow as bad:
                kept.drop(str(bad), number)
        if again and kept.writer is not None:
            kept.writer.close()
    return kept


def _check_columns(origin: Origin, columns: dict[str, str], given: Iterable[str], found: list[str]) -> None:
    """Refuse columns that stand in no row."""
    # A system text has its place in front of an explicit prompt only.
    needed = set(columns) if "system" in columns else {"chosen", "rejected", *given}
    missing = [columns[name] for name in CANONICAL if name in needed and columns[name] not in found]
    # Without any column no row was an object: those are counted by reason.
    if missing and found:
        listed = f"expected one of {found[:20]}" + (" and more" if len(found) > 20 else "")
        raise origin.error(f"has unknown column {', '.join(map(repr, missing))}", listed, key="columns")
