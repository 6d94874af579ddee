"""Rank 3: checkpoint files: written whole or not at all, with a digest beside them, and found again."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from sdpo_lightning.failpoints import failpoint
from sdpo_lightning.files import cannot_write, file_digest, fsync, publish, write_json
from sdpo_lightning.ledger import LEDGER, Ledger
from sdpo_lightning.ranks import is_first
from sdpo_lightning.types import ConfigurationError, ResumeError

log = logging.getLogger(__name__)

# In a folder of shards: what isn't one.
META = "meta.pt"


class _HashingFile:
    """What `torch.save` writes to: hashes what passes, and keeps the error that torch would replace."""

    def __init__(self, path: Path) -> None:
        self._handle = path.open("wb")
        self._digest = hashlib.sha256()
        self.error: OSError | None = None
        self.written = 0

    def write(self, data: Any) -> int:
        """Append bytes, and return their number.

        Raises:
            OSError: of the disk; kept in `error` too.
        """
        try:
            size = self._handle.write(data)
        except OSError as error:
            self.error = error
            raise
        self._digest.update(data)
        if not self.written:
            self._handle.flush()
            failpoint("mid_checkpoint")
        self.written += size
        return size

    def flush(self) -> None:
        """Hand what is buffered to the system.

        Raises:
            OSError: of the disk.
        """
        self._handle.flush()

    def close(self) -> str:
        """Close the file, and return the sha256 of all bytes, in hex.

        Raises:
            OSError: of the disk.
        """
        self._handle.close()
        return self._digest.hexdigest()


def save_file_atomically(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint beside its final place, read it back, and give it its name.

    Raises:
        OSError: the disk is full, or the folder can't be written; earlier checkpoints are untouched.
    """
    staging = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _HashingFile(staging)
        try:
            # It only writes and flushes.
            torch.save(content, cast(IO[bytes], file))
            file.flush()
        except (OSError, RuntimeError) as error:
            raise (file.error or error) from None
        finally:
            digest = file.close()
        commit(staging, path, digest)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise OSError(cannot_write(path, error, tensor_bytes(content))) from error


def begin_shards(path: Path) -> None:
    """Remove what a killed process has left of a folder of shards. Rank 0 does it, before any rank writes."""
    shutil.rmtree(path.with_name(f".{path.name}.tmp"), ignore_errors=True)


def save_shards_atomically(
    shards: dict[str, Any], rest: bytes, path: Path, group: dist.ProcessGroup | None = None
) -> None:
    """Write a folder that appears whole or not at all. A collective, which ends with the shards: rank 0 commits alone.

    Args:
        shards: this rank's, in host memory or not.
        rest: what rank 0 says, as a file.
        path: the folder; `begin_shards` was called for it.
        group: of the collective; None is the default group.

    Raises:
        OSError: a disk is full or can't be written, on all ranks; a failed commit, on rank 0.
    """
    staging = path.with_name(f".{path.name}.tmp")
    try:
        save(shards, checkpoint_id=staging, process_group=group)
        if is_first():
            failpoint("mid_checkpoint")
            (staging / META).write_bytes(rest)
            commit(staging, path)
    except (CheckpointException, OSError) as error:
        if is_first():
            shutil.rmtree(staging, ignore_errors=True)
        cause: Any = error
        if isinstance(error, CheckpointException):
            cause = next(iter(error.failures.values()))[0]
        raise OSError(cannot_write(path, cause, tensor_bytes(shards))) from error


def commit(staging: Path, path: Path, digest: str | None = None) -> None:
    """Give a finished checkpoint (file or folder) its name and its digest.

    Args:
        staging: the checkpoint.
        path: its name.
        digest: of what was meant to be written; None takes that of the disk.

    Raises:
        OSError: the disk doesn't hold what was written.
    """
    for file in staging.iterdir() if staging.is_dir() else ():
        fsync(file)
    fsync(staging)
    found = file_digest(staging)
    if digest not in (None, found):
        raise OSError(f"what was read back of {staging} isn't what was written")
    # An older checkpoint of that name stays valid until the new one has its place.
    digests = [*_beside(path).get("sha256", ())[-1:], found]
    number = 1 + max((_beside(other).get("number", 0) for other in _listed(path.parent)), default=0)
    write_json(_sidecar(path), {"number": number, "sha256": digests})
    failpoint("before_checkpoint")
    if path.is_dir():
        shutil.rmtree(path)
    publish(staging, path)
    failpoint("after_checkpoint")


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint and its digest."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    _sidecar(path).unlink(missing_ok=True)


def sweep_checkpoints(folder: Path) -> None:
    """Remove what a killed process was writing, in a folder that may hold other files than ours."""
    for path in (*folder.glob(".*.ckpt.tmp"), *folder.glob(".*.ckpt.json.tmp")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def keep_newest(folder: Path, number: int) -> None:
    """Delete all but the newest checkpoints of a folder; those without a digest are not ours."""
    for path in _newest_first([folder])[number:]:
        if _sidecar(path).exists():
            remove_checkpoint(path)
    for sidecar in folder.glob("*.ckpt.json"):
        if not sidecar.with_suffix("").exists():
            sidecar.unlink()


def problem_of(path: Path, required: bool = True) -> str:
    """Why a checkpoint can't be trusted, or nothing.

    Args:
        path: the checkpoint.
        required: a checkpoint without a digest can't.
    """
    beside = _beside(path)
    if not beside:
        return f"no digest in {_sidecar(path).name}" if required else ""
    return "" if file_digest(path) in beside["sha256"] else "its sha256 isn't the recorded one"


def find_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint that the same command goes on from.

    Args:
        run_dir: of the run.
        resume: `auto` or `never`.

    Returns:
        The newest valid one; None where the run begins.

    Raises:
        ConfigurationError: `never`, and there is something in the folder.
        ResumeError: there are checkpoints, or finished stages, and no valid checkpoint.
    """
    if resume == "never" and run_dir.exists() and any(path.name != ".lock" for path in run_dir.iterdir()):
        raise ConfigurationError(
            f"`--resume never`: {run_dir} isn't empty; set another `trainer.default_root_dir`, or leave `--resume` out "
            "to go on with the run in it"
        )
    ledger = Ledger.read(run_dir)
    if ledger is None:
        return None
    damaged: list[str] = []
    # An absolute folder stays what it is.
    for path in _newest_first(run_dir / folder for folder in ledger.checkpoints):
        problem = problem_of(path)
        if not problem:
            if damaged:
                log.warning("damaged: %s; going on from %s", "; ".join(damaged), path)
            return path
        damaged.append(f"{path} ({problem})")
    if damaged or any(stage.status == "done" for stage in ledger.own_stages):
        raise ResumeError(
            f"{run_dir / LEDGER} tells of a run that has begun, and no checkpoint of it is valid: "
            f"{'; '.join(damaged) or 'there is none'}; restore one, or start anew in another `trainer.default_root_dir`"
        )
    return None


def tensor_bytes(content: Any) -> int:
    """Bytes of all tensors in nested containers."""
    if isinstance(content, torch.Tensor):
        return content.numel() * content.element_size()
    values: Iterable[Any] = content.values() if isinstance(content, dict) else content
    return sum(map(tensor_bytes, values)) if isinstance(content, dict | list | tuple) else 0


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _beside(path: Path) -> dict[str, Any]:
    try:
        return json.loads(_sidecar(path).read_text())
    except (OSError, ValueError):
        return {}


def _listed(folder: Path) -> Sequence[Path]:
    return [path for path in folder.glob("*.ckpt") if not path.name.startswith(".")]


def _newest_first(folders: Iterable[Path]) -> list[Path]:
    found = {path for folder in folders for path in _listed(folder)}
    return sorted(found, key=lambda path: (_beside(path).get("number", 0), path.stat().st_mtime_ns), reverse=True)
