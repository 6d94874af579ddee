"""Rank 0: a finished file gets its name, on the disk. Without torch, so that `report` starts at once."""

from __future__ import annotations

import os
from pathlib import Path


def publish(staging: Path, path: Path) -> None:
    """Give a finished file its name, so that it outlives a power cut."""
    fsync(staging)
    os.replace(staging, path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
