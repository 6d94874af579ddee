"""Rank 1: files and folders that appear whole or not at all, and the CSV file that is cut back on resume."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sdpo_lightning.failpoints import failpoint
from sdpo_lightning.publishing import fsync as fsync
from sdpo_lightning.publishing import publish as publish
from sdpo_lightning.publishing import write_text
from sdpo_lightning.ranks import from_first_rank, is_first


def write_json(path: Path, content: Any) -> None:
    """Write a file that appears whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


# Of a run directory, that hold what the run leaves.
FOLDERS = ("checkpoints", "stages", "references", "random_states", "new_pairs", "report")


def sweep(run_dir: Path) -> None:
    """Remove what a killed process was writing."""
    for folder in (run_dir, *(run_dir / name for name in FOLDERS)):
        for path in folder.glob(".*.tmp"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def file_digest(path: Path) -> str:
    """sha256 of a file, or of the names and contents of a folder's files."""
    digest = hashlib.sha256()
    if path.is_dir():
        for inner in sorted(inner for inner in path.rglob("*") if inner.is_file()):
            digest.update(f"{inner.relative_to(path)}:{file_digest(inner)};".encode())
        return digest.hexdigest()
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all, in place of an older one: yields where to write its files.

    A collective: rank 0 makes and publishes it.

    Raises:
        OSError: what rank 0 met, on all ranks.
    """
    staging = folder.with_name(f".{folder.name}.tmp")
    from_first_rank(lambda: _begin(staging))
    try:
        yield staging
        from_first_rank(lambda: _publish(staging, folder))
    except (OSError, SafetensorError) as error:
        if is_first():
            shutil.rmtree(staging, ignore_errors=True)
        raise OSError(cannot_write(folder, error)) from error


def cannot_write(path: Path, error: Exception, size: int | None = None) -> str:
    """What to say of a file or folder that couldn't be written.

    Args:
        path: its place.
        error: what was met.
        size: bytes that it needs, where that is known.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    needs = f"it needs about {size:,} bytes, " if size is not None else ""
    return (
        f"{path} can't be written ({error}); {needs}{folder} has {shutil.disk_usage(folder).free:,} bytes free. "
        "Earlier checkpoints are intact: make room and start the same command"
    )


def _begin(staging: Path) -> None:
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)


def _publish(staging: Path, folder: Path) -> None:
    for path in staging.iterdir():
        fsync(path)
    fsync(staging)
    failpoint("before_rename")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staging, folder)
    fsync(folder.parent)


class MetricsFile:
    """A CSV file that is flushed at every row and cut back to a step on resume.

    Args:
        path: of the file.
        columns: header; a value under another name is dropped.
        step: rows beyond this step are dropped; 0 begins a new file.
    """

    def __init__(self, path: Path, columns: list[str], step: int) -> None:
        self._path = path
        self._columns = columns
        self._last: dict[str, Any] = {}
        kept = []
        if step > 0 and path.exists():
            with path.open(newline="") as handle:
                kept = [row for row in csv.DictReader(handle) if int(row["step"]) <= step]
        path.parent.mkdir(parents=True, exist_ok=True)
        text = self._lines([dict.fromkeys(columns), *kept])
        header = ",".join(columns) + "\n"
        path.write_text(header + text.split("\n", 1)[1])
        if kept:
            self._last = kept[-1]
        self._last_offset = path.stat().st_size - len(self._lines([self._last]).encode()) if kept else None

    def _lines(self, rows: list[dict[str, Any]]) -> str:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, self._columns, extrasaction="ignore", lineterminator="\n")
        writer.writerows(rows)
        return buffer.getvalue()

    def append(self, row: dict[str, Any]) -> None:
        """Add one row."""
        self._last, self._last_offset = dict(row), self._path.stat().st_size
        with self._path.open("a") as handle:
            handle.write(self._lines([self._last]))

    def amend(self, step: int, stage_index: int, values: dict[str, Any]) -> None:
        """Add values to the last row if it is of this step, else add a row."""
        if self._last_offset is None or int(self._last["step"]) != step:
            self.append({"step": step, "stage/index": stage_index, **values})
            return
        self._last |= values
        with self._path.open("r+") as handle:
            handle.truncate(self._last_offset)
            handle.seek(self._last_offset)
            handle.write(self._lines([self._last]))
