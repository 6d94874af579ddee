"""Rank 0: versions of what is installed, read without importing it."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def version_of(package: str) -> str:
    """Version of a package, read once: its metadata is a long text, and every M_t's card says it.

    Args:
        package: its name in the package index.

    Raises:
        PackageNotFoundError: it isn't installed.
    """
    return version(package)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Python, the system, and those of the packages that are installed.

    Args:
        packages: their names in the package index.
    """
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in packages:
        try:
            found[name] = version_of(name)
        except PackageNotFoundError:
            continue
    return found
