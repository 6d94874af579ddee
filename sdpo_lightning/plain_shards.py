"""Rank 1: distributed checkpoints read without running what may stand in them; PyTorch's own readers unpickle."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem

_METADATA = (
    *("Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex"),
    *("StorageMeta", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
)
_ALLOWED = {("torch.distributed.checkpoint.metadata", name) for name in _METADATA} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("collections", "OrderedDict"),
}


class _PlainUnpickler(pickle.Unpickler):
    """Knows nothing but the records of a distributed checkpoint and PyTorch's dtypes."""

    def find_class(self, module: str, name: str) -> Any:
        """Only what the list of shards is made of."""
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


def check_shards(folder: Path) -> None:
    """Refuse a distributed checkpoint whose list of shards would run code. To be called before any reader is.

    Args:
        folder: of the checkpoint.

    Raises:
        pickle.UnpicklingError: it holds more than that list.
    """
    with (folder / ".metadata").open("rb") as file:
        _PlainUnpickler(file).load()


class PlainPlanner(DefaultLoadPlanner):
    """Reads what isn't a shard, such as a learning rate, as plain values only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Read one value.

        Raises:
            pickle.UnpicklingError: it is none that PyTorch takes for plain.
        """
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)
