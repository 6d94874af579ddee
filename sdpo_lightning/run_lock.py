"""Rank 1: one process a run directory."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
from pathlib import Path

from sdpo_lightning.types import ConfigurationError

log = logging.getLogger(__name__)

_NAME = ".lock"


class RunLock:
    """The file `.lock` of a run directory, with pid and host. The system frees it when the process ends, however."""

    def __init__(self) -> None:
        self._handle: int | None = None

    def take(self, run_dir: Path) -> None:
        """Lock the directory, or take over what a dead process has left.

        Raises:
            ConfigurationError: another process has it.
            OSError: the directory isn't writable.
        """
        if self._handle is not None:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(run_dir / _NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 4096).decode(errors="replace").strip()
            os.close(handle)
            raise ConfigurationError(
                f"`trainer.default_root_dir`: {run_dir} is in use by another process, {owner or 'which is starting'}; "
                "wait for it, or set another folder"
            ) from None
        except OSError as error:
            log.warning("%s is on a file system without locks (%s): nothing keeps a second process out", run_dir, error)
        if left := os.read(handle, 4096).decode(errors="replace").strip():
            log.warning("taking over the lock of a process that has ended: %s", left)
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        self._handle = handle

    def release(self) -> None:
        """Free the directory."""
        if self._handle is not None:
            # Not unlinked: another process may have opened it already.
            os.ftruncate(self._handle, 0)
            os.close(self._handle)
            self._handle = None


def check_free(run_dir: Path) -> None:
    """Refuse a directory that another process uses, without locking it.

    Raises:
        ConfigurationError: it is in use.
    """
    if (run_dir / _NAME).exists():
        lock = RunLock()
        lock.take(run_dir)
        lock.release()
