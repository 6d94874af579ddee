"""Rank 0: how much memory this process has taken."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_resident() -> int:
    """Most resident bytes of this process so far; 0 where the system doesn't say (`/proc`)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def peak_bytes() -> int:
    """The same, where the system doesn't say by its own count, which in a child begins with what its parent held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return peak_resident() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
