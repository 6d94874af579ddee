"""Rank 0: tensors that leave their device for a while and come back bit for bit."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, UntypedStorage
from torch.distributed.tensor import DTensor


@contextmanager
def parked(tensors: Iterable[Tensor], device: torch.device) -> Iterator[int]:
    """Within it the tensors take no memory on a device; their bytes wait in the memory of the CPU.

    Storages are emptied and filled again, not replaced: parameters, tied weights, views and what an optimizer holds
    stay what they are. Nothing may read them within. They come back after an exception too.

    Args:
        tensors: of any kind, shards too; what lies on another device stays there.
        device: which is to be free. On a CPU the same is done, where it gains nothing.

    Yields:
        The bytes that were given back.

    Raises:
        torch.OutOfMemoryError: on leaving, when somebody else still has the memory.
    """
    homes: list[tuple[UntypedStorage, UntypedStorage]] = []
    _settle(device)
    try:
        for storage in _storages(tensors, device):
            home = UntypedStorage(storage.nbytes())
            home.copy_(storage)
            storage.resize_(0)
            homes.append((storage, home))
        _settle(device)
        yield sum(home.nbytes() for _, home in homes)
    finally:
        _settle(device)
        while homes:
            storage, home = homes.pop()
            storage.resize_(home.nbytes())
            storage.copy_(home)
        _settle(device)


def _storages(tensors: Iterable[Tensor], device: torch.device) -> list[UntypedStorage]:
    """Each storage once, and all of them such that can be emptied."""
    sharing: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.device == device and local.untyped_storage().nbytes():
            sharing.setdefault(local.untyped_storage().data_ptr(), []).append(local)
    return [_resizable(group) for group in sharing.values()]


def _resizable(group: list[Tensor]) -> UntypedStorage:
    """The storage of some tensors; one that belongs to a file (on a CPU) gives way to a copy that is theirs alone."""
    storage = group[0].untyped_storage()
    if storage.resizable():
        return storage
    own = UntypedStorage(storage.nbytes()).copy_(storage)
    for tensor in group:
        place = tensor.storage_offset(), tensor.size(), tensor.stride()
        tensor.data = torch.empty(0, dtype=tensor.dtype).set_(own, *place)
    return own


def _settle(device: torch.device) -> None:
    """Have no kernel under way, and no memory kept in reserve."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
