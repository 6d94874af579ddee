"""Rank 1: a file, a folder or a hub set -> its rows one by one, as they stand there."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from sdpo_lightning.types import ConfigurationError

Record = tuple[int, dict[str, Any] | str]  # line or row from 1; the needed columns, or why there are none

_BATCH_ROWS = 1000
_FILE_ENDINGS = (".jsonl", ".json", ".gz", ".parquet", ".csv", ".tsv", ".txt", ".arrow", ".zst", ".zip")
_KINDS = "a .jsonl, .jsonl.gz or .parquet file, a `save_to_disk` folder or a hub name"
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Origin:
    """Where rows come from, for reading and for error messages.

    Attributes:
        name: of the source.
        path: a file, a folder or the name of a hub data set.
        key: setting that holds the path.
        split: of a hub data set or a saved `DatasetDict`.
        limit: only the first N rows.
    """

    name: str
    path: str
    key: str
    split: str
    limit: int | None

    def setting(self, key: str) -> str:
        """A setting of the source, as the user writes it."""
        return f"`data.sources[{self.name}].{key}`"

    def error(self, found: str, expected: str, key: str | None = None) -> ConfigurationError:
        """The refusal of a source: what was found, what was expected, which setting to change."""
        what = f"source {self.name!r}: {self.path!r} {found}; {expected}"
        return ConfigurationError(f"{what}; change {self.setting(key or self.key)}")


@dataclass
class Table:
    """The wanted columns of the first rows, and the names of all columns, which grow while a text file is read."""

    records: Callable[[], Iterator[Record]]
    found: dict[str, None]  # a set that keeps the order


def local_path(path: str) -> Path | None:
    """The file or folder that a source's path names, None for the name of a hub data set."""
    local = Path(os.path.expanduser(path))  # unlike Path.expanduser, leaves an unknown ~user alone
    is_local = path.lower().endswith(_FILE_ENDINGS) or path[:1] in ("", *"./~") or path.count("/") > 1
    return local if is_local or local.exists() else None


def open_table(origin: Origin, wanted: set[str]) -> Table:
    """Find the reader of a path.

    Args:
        origin: where the rows are.
        wanted: columns that are needed.

    Raises:
        ConfigurationError: nothing readable there; also while the records are read.
    """
    path = local_path(origin.path)
    if path is None or path.is_dir():
        return _dataset_table(origin, path, wanted)
    if not path.exists():
        raise origin.error("not found", f"expected {_KINDS}")
    lower = path.name.lower()
    if not lower.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        hint = ", with one JSON object a line in JSONL" if ".json" in lower else ""
        raise origin.error(f"is a file of unknown kind {path.suffix!r}", f"expected {_KINDS}{hint}")
    with _readable(origin):
        with path.open("rb") as file:
            head = file.read(len(_LFS_POINTER))
        if head == _LFS_POINTER:
            raise origin.error("is a git-LFS pointer, not the data", "fetch the data by `git lfs pull`")
        if not head:
            raise origin.error("is empty (0 bytes)", "expected one preference pair a row")
        return (_parquet_table if lower.endswith(".parquet") else _jsonl_table)(origin, path, wanted)


@contextmanager
def _readable(origin: Origin) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, pa.ArrowException) as error:
        found = f"can't be read ({_first_line(error)})"
        raise origin.error(found, "expected a whole file of the kind that its name says") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"


def _jsonl_table(origin: Origin, path: Path, wanted: set[str]) -> Table:
    found: dict[str, None] = {}

    def records() -> Iterator[Record]:
        # Binary files split at b"\n" only: text may hold U+2028, at which str.splitlines would cut a row.
        with _readable(origin), gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as lines:
            for number, value in islice(_json_lines(origin, lines), origin.limit):
                if isinstance(value, dict):
                    found.update(dict.fromkeys(value))
                    value = {name: value[name] for name in wanted if name in value}
                yield number, value

    return Table(records, found)


def _json_lines(origin: Origin, lines: Iterable[bytes]) -> Iterator[Record]:
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


def _parquet_table(origin: Origin, path: Path, wanted: set[str]) -> Table:
    with pq.ParquetFile(path) as file:
        found = file.schema_arrow.names
    names = [name for name in found if name in wanted] or found  # without columns it would have no rows

    def rows() -> Iterator[Record]:
        with _readable(origin), pq.ParquetFile(path) as file:
            batches = file.iter_batches(_BATCH_ROWS, columns=names)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)

    return Table(lambda: islice(rows(), origin.limit), dict.fromkeys(found))


def load_dataset(origin: Origin, folder: Path | None) -> datasets.Dataset:
    """One split of a `save_to_disk` folder, or without one of a hub data set."""
    split = origin.split
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
    return loaded


def _dataset_table(origin: Origin, folder: Path | None, wanted: set[str]) -> Table:
    loaded = load_dataset(origin, folder)
    found = list(loaded.column_names)
    rows = loaded.with_format(None).select(range(min(len(loaded), origin.limit or len(loaded))))
    names = [name for name in found if name in wanted] or found  # without columns it would have no rows
    selected = rows.select_columns(names)
    return Table(lambda: enumerate(selected, start=1), dict.fromkeys(found))
