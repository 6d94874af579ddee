"""Rank 2: a file, a folder or a hub set -> canonical preference rows, bad rows counted by reason.

The walk: read the needed columns of the first `limit` rows -> check that the columns exist -> bring each row
into one form or find why it can't be -> one `datasets.Dataset`. A bad row is dropped, a bad file is refused.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from sdpo_lightning.data.rows import CANONICAL, BadRow, Pair, canonical_pair
from sdpo_lightning.types import ConfigurationError

log = logging.getLogger(__name__)

Record = tuple[int, dict[str, Any] | str]  # line or row from 1; the needed columns, or why there are none

_FILE_ENDINGS = (".jsonl", ".json", ".gz", ".parquet", ".csv", ".tsv", ".txt", ".arrow", ".zst", ".zip")
_KINDS = "a .jsonl, .jsonl.gz or .parquet file, a `save_to_disk` folder or a hub name"
_LFS_POINTER = b"version https://git-lfs"


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


def load_source(
    source: PreferenceSource,
    source_index: int = 0,
    path: str | None = None,
    on_bad_row: Literal["drop", "error"] = "drop",
    first_row: int = 0,
) -> SourceRows:
    """Read one source.

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
    origin = _Origin(source, path or source.path, "path" if path is None else "val_path")
    columns = {name: name for name in CANONICAL[:3]} | (source.columns or {})
    records, found = _read(origin, set(columns.values()))
    if not records:
        raise origin.error("is empty (0 rows)", "expected one preference pair a row")
    explicit = _check_columns(origin, columns, found)
    kept: list[tuple[int, Pair]] = []
    places: dict[str, list[int]] = {}
    for row, (number, record) in enumerate(records):
        try:
            pair = canonical_pair(record, columns, explicit)
            if kept and isinstance(pair[0], str) != isinstance(kept[0][1][0], str):
                raise BadRow("other_form")
        except BadRow as bad:
            if on_bad_row == "error":
                at = f"has a bad row at {origin.path}:{number}: {bad}"
                raise origin.error(at, "`data.on_bad_row: error` allows none") from None
            places.setdefault(str(bad), []).append(number)
        else:
            kept.append((source_index << 40 | (first_row + row), pair))
    dropped = {reason: len(numbers) for reason, numbers in places.items()}
    examples = {reason: [f"{origin.path}:{n}" for n in numbers[:3]] for reason, numbers in places.items()}
    _report(origin, {reason: (len(numbers), numbers[0]) for reason, numbers in places.items()}, len(records))
    return SourceRows(_dataset(kept), dropped, examples, len(records), not isinstance(kept[0][1][0], str))


def _report(origin: _Origin, dropped: dict[str, tuple[int, int]], total: int) -> None:
    """Log the dropped rows (reason -> how many, first place), refuse a source that has no others."""
    text = ", ".join(f"{count} {reason} (first at {place})" for reason, (count, place) in dropped.items())
    name, count = origin.source.name, sum(count for count, _ in dropped.values())
    if count == total:
        keys = f"{origin.setting(origin.key)} or {origin.setting('columns')}"
        found = f"source {name!r}: 0 of {total} rows left of {origin.path!r}: {text}"
        raise ConfigurationError(f"{found}; change {keys}")
    if count:
        level = logging.WARNING if count > 0.01 * total else logging.INFO
        log.log(level, "source %r: %d of %d rows of %r dropped: %s", name, count, total, origin.path, text)


def _dataset(kept: list[tuple[int, Pair]]) -> datasets.Dataset:
    string = datasets.Value("string")
    value = string if isinstance(kept[0][1][0], str) else [{"role": string, "content": string}]
    columns: dict[str, list[Any]] = {"pair_id": [pair_id for pair_id, _ in kept]}
    columns |= {name: [pair[i] for _, pair in kept] for i, name in enumerate(CANONICAL[:3])}
    features = {"pair_id": datasets.Value("int64")} | dict.fromkeys(CANONICAL[:3], value)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@dataclass(frozen=True)
class _Origin:
    """Where rows come from, for reading and for error messages."""

    source: PreferenceSource
    path: str
    key: str

    def setting(self, key: str) -> str:
        return f"`data.sources[{self.source.name}].{key}`"

    def error(self, found: str, expected: str, key: str | None = None) -> ConfigurationError:
        what = f"source {self.source.name!r}: {self.path!r} {found}; {expected}"
        return ConfigurationError(f"{what}; change {self.setting(key or self.key)}")


# ---- a path -> records


def _read(origin: _Origin, wanted: set[str]) -> tuple[list[Record], list[str]]:
    """The wanted columns of the first rows, and the names of all columns."""
    path = Path(os.path.expanduser(origin.path))  # unlike Path.expanduser, leaves an unknown ~user alone
    lower = path.name.lower()
    if path.is_dir():
        return _read_dataset(origin, path, wanted)
    if not path.exists():
        if lower.endswith(_FILE_ENDINGS) or origin.path[0] in "./~" or origin.path.count("/") > 1:
            raise origin.error("not found", f"expected {_KINDS}")
        return _read_dataset(origin, None, wanted)
    if not lower.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        hint = ", with one JSON object a line in JSONL" if ".json" in lower else ""
        raise origin.error(f"is a file of unknown kind {path.suffix!r}", f"expected {_KINDS}{hint}")
    try:
        with path.open("rb") as file:
            head = file.read(len(_LFS_POINTER))
        if head == _LFS_POINTER:
            raise origin.error("is a git-LFS pointer, not the data", "fetch the data by `git lfs pull`")
        if not head:
            raise origin.error("is empty (0 bytes)", "expected one preference pair a row")
        return (_read_parquet if lower.endswith(".parquet") else _read_jsonl)(origin, path, wanted)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, pa.ArrowException) as error:
        found = f"can't be read ({_first_line(error)})"
        raise origin.error(found, "expected a whole file of the kind that its name says") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"


def _read_jsonl(origin: _Origin, path: Path, wanted: set[str]) -> tuple[list[Record], list[str]]:
    records: list[Record] = []
    found: dict[str, None] = {}  # a set that keeps the order
    # Binary files split at b"\n" only: text may hold U+2028, at which str.splitlines would cut a row.
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as lines:
        for number, value in islice(_json_lines(origin, lines), origin.source.limit):
            if isinstance(value, dict):
                found.update(dict.fromkeys(value))
                value = {name: value[name] for name in wanted if name in value}
            records.append((number, value))
    return records, list(found)


def _json_lines(origin: _Origin, lines: Iterable[bytes]) -> Iterator[Record]:
    for number, line in enumerate(lines, start=1):
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not text.strip():
            continue
        try:
            value = json.loads(text.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise origin.error(f"is not UTF-8 (line {number})", "expected UTF-8 text") from error
        except (ValueError, RecursionError):
            yield number, "invalid_json"
        else:
            yield number, value if isinstance(value, dict) else "not_an_object"


def _read_parquet(origin: _Origin, path: Path, wanted: set[str]) -> tuple[list[Record], list[str]]:
    with pq.ParquetFile(path) as file:
        found = file.schema_arrow.names
        table = file.read(columns=[name for name in found if name in wanted])
    return list(enumerate(table.slice(0, origin.source.limit).to_pylist(), start=1)), found


def _read_dataset(origin: _Origin, folder: Path | None, wanted: set[str]) -> tuple[list[Record], list[str]]:
    """A `save_to_disk` folder, or without one a hub data set."""
    split = origin.source.split
    try:
        if folder is None:
            loaded = datasets.load_dataset(origin.path, split=split)
        else:
            loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # disk, network, hub and builders: the errors share no base class
        kind = "no local path, and no hub data set" if folder is None else "no folder of `save_to_disk`"
        expected = f"expected {_KINDS}; of the hub, check name, split {split!r} and network"
        raise origin.error(f"is {kind} ({_first_line(error)})", expected) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise origin.error(f"has no split {split!r}", f"expected one of {list(loaded)}", key="split")
        loaded = loaded[split]
    found = list(loaded.column_names)
    rows = loaded.with_format(None).select(range(min(len(loaded), origin.source.limit or len(loaded))))
    names = [name for name in found if name in wanted] or found  # without columns it would have no rows
    return list(enumerate(rows.select_columns(names), start=1)), found


def _check_columns(origin: _Origin, columns: dict[str, str], found: list[str]) -> bool:
    """Whether there is a column of prompts; refuses columns that stand in no row."""
    explicit = columns["prompt"] in found
    # A system text has its place in front of an explicit prompt only.
    needed = set(columns) if "system" in columns else {"chosen", "rejected", *(origin.source.columns or {})}
    missing = [columns[name] for name in CANONICAL if name in needed and columns[name] not in found]
    # Without any column no row was an object: those are counted by reason.
    if missing and found:
        listed = f"expected one of {found[:20]}" + (" and more" if len(found) > 20 else "")
        raise origin.error(f"has unknown column {', '.join(map(repr, missing))}", listed, key="columns")
    return explicit
