"""Rank 0: finished files get their names, on the disk. Without torch, so that `report` starts at once."""

from __future__ import annotations

import os
from pathlib import Path


def publish(staging: Path, path: Path) -> None:
    """Give a finished file its name, so that it outlives a power cut."""
    fsync(staging)
    os.replace(staging, path)
    fsync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.tmp")
    staging.write_text(text, encoding="utf-8")
    publish(staging, path)


def fsync(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
