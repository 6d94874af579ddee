"""Rank 2: the random states of all ranks, for checkpoints that resume exactly."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sdpo_lightning.publishing import publish
from sdpo_lightning.ranks import from_every_rank


def collect_random_states() -> list[dict[str, Any]]:
    """Random states of Python, NumPy, torch and CUDA of every rank, as plain tensors and numbers.

    Returns:
        One dictionary a rank; loadable with `weights_only=True`.
    """
    return from_every_rank(_own_states())


def _own_states() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    state = np.random.get_state(legacy=True)
    assert isinstance(state, tuple)
    name, keys, position, has_gauss, cached = state
    assert version == 3 and name == "MT19937"
    return {
        "python": torch.tensor(internal, dtype=torch.int64),
        "python_gauss": gauss,
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_rest": [int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": [state.cpu() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def restore_random_states(states: Sequence[dict[str, Any]]) -> None:
    """Set this rank's random states; a rank that wasn't there when they were saved keeps its own."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank >= len(states):
        return
    _set_states(states[rank])


def _set_states(state: dict[str, Any]) -> None:
    random.setstate((3, tuple(state["python"].tolist()), state["python_gauss"]))
    position, has_gauss, cached = state["numpy_rest"]
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Give this rank's random states back as they were, whatever is drawn within."""
    before = _own_states()
    try:
        yield
    finally:
        _set_states(before)


def states_path(run_dir: Path, stage_index: int) -> Path:
    """Where a run keeps the states that a stage ended with."""
    return run_dir / "random_states" / f"{stage_index:02d}.pt"


def write_random_states(path: Path, states: Sequence[dict[str, Any]]) -> None:
    """Write the states of all ranks to a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.tmp")
    torch.save(list(states), staging)
    publish(staging, path)


def read_random_states(path: Path) -> list[dict[str, Any]] | None:
    """Read what `write_random_states` wrote; None if there is none."""
    return torch.load(path, weights_only=True) if path.exists() else None
