"""Rank 1: checkpoints that are written while training goes on: copied to host memory first, the rest in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterable
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from sdpo_lightning.ranks import together


class BackgroundWrites:
    """For `StageCheckpoint(writes=...)`: training waits for a copy in host memory, not for the disk.

    Write, fsync, digest and commit run in a thread; its collectives have a gloo group of their own, so that none of
    them can meet one of the training's. One save at a time: the next one, a stage's end and the run's end wait for it.
    Host memory holds a copy of what is saved meanwhile (on a GPU with `fsdp2` that copy is made anyway).
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._group: dist.ProcessGroup | None = None

    def hold(self, content: Any, live: Container[int] | None = None) -> Any:
        """A copy in host memory that later steps don't change.

        Args:
            content: nested containers with tensors.
            live: storages that a step writes into (see `storages`); others on the CPU are taken as they are. None
                copies all.
        """
        return _Copier(live).copy(content)

    def group(self) -> dist.ProcessGroup | None:
        """The process group of the thread; the first call is a collective."""
        if self._group is None and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")
        return self._group

    def begin(self, write: Callable[[], None]) -> None:
        """Start to write.

        Args:
            write: does it all, commit included.
        """
        assert self._thread is None, "a save is under way"
        # A process that leaves at a second signal doesn't wait for it.
        self._thread = threading.Thread(target=self._run, args=(write,), daemon=True)
        self._thread.start()

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # noqa: BLE001
            self._error = error

    def is_done(self) -> bool:
        """Whether this rank has nothing left to write."""
        return self._thread is None or not self._thread.is_alive()

    def join(self, seconds: float | None = None) -> None:
        """Wait for this rank's writing.

        Args:
            seconds: at most.

        Raises:
            Exception: what the thread met.
            TimeoutError: it still writes.
        """
        if self._thread is None:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            raise TimeoutError(f"a checkpoint is still being written after {seconds:.0f} seconds")
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def settle(self) -> None:
        """Wait until all ranks have written. A collective.

        Raises:
            Exception: what one of them met, on all of them.
        """
        together(self.join)


def storages(tensors: Iterable[torch.Tensor]) -> set[int]:
    """Addresses of the memory behind tensors; of a sharded one, that of this rank's shard."""
    return {_local(tensor).untyped_storage().data_ptr() for tensor in tensors}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    own = tensor.detach()
    return own.to_local() if isinstance(own, DTensor) else own


class _Copier:
    """Copies nested containers; two views of one memory (tied weights) become two names of one copy."""

    def __init__(self, live: Container[int] | None) -> None:
        self._live = live
        self._made: dict[Any, torch.Tensor] = {}

    def copy(self, content: Any) -> Any:
        """The same containers, with each tensor in the memory of the CPU and in its shape and dtype.

        A tensor that is there and isn't among the live ones is taken as it is.
        """
        if isinstance(content, torch.Tensor):
            return self._tensor(content)
        if isinstance(content, dict):
            return {key: self.copy(value) for key, value in content.items()}
        if type(content) in (list, tuple):
            return type(content)(self.copy(value) for value in content)
        return deepcopy(content)

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        local = _local(tensor)
        address = local.untyped_storage().data_ptr()
        if self._live is not None and local.device.type == "cpu" and address not in self._live:
            return tensor
        key = (address, local.storage_offset(), local.shape, local.stride(), local.dtype)
        if key not in self._made:
            whole = tensor.detach()
            self._made[key] = whole.clone() if local.device.type == "cpu" else whole.to("cpu")
        return self._made[key]
