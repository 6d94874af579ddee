"""Rank 0: how much memory this process has taken, and what it does with what is freed."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

# Just below the most that glibc's threshold grows to, 32 MiB on 64 bits.
_RAISES_THRESHOLD = 31 * 2**20


def keep_freed_memory() -> None:
    """Let glibc keep what a pass frees for the next one: new pages cost a CPU some percent of a step.

    glibc hands memory back from a threshold on that grows with the largest block freed so far, up to a limit
    (mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD); one freed block takes it there. Elsewhere nothing changes.
    """
    torch.empty(_RAISES_THRESHOLD, dtype=torch.uint8, device="cpu")


def peak_resident() -> int:
    """Most resident bytes of this process so far; 0 where the system doesn't say (`/proc`)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def peak_bytes() -> int:
    """The same, where the system doesn't say by its own count, which in a child begins with what its parent held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return peak_resident() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
