"""Locks between processes, also of several machines. They end with the process that holds them."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

Lock = tuple[int, Path]


def take_lock(directory: Path, wait: bool = False) -> Lock | None:
    """Lock a directory by a file beside it, `.<name>.lock`. None where the file system has no locks.

    POSIX locks, unlike flock's, are not inherited by DataLoader workers, which outlive a killed run, and work over NFS.

    Args:
        wait: until another process gives it back.

    Raises:
        BlockingIOError: if another process has it, without `wait`.
        OSError: if the file cannot be made.
    """
    path = directory.with_name(f".{directory.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            os.close(handle)
            if isinstance(error, (BlockingIOError, PermissionError)):
                raise BlockingIOError(error.errno, "locked by another process", str(path)) from None
            return None
        if path.exists() and os.path.samestat(path.stat(), os.fstat(handle)):
            return handle, path
        os.close(handle)  # its owner has removed it in between


def release_lock(lock: Lock | None) -> None:
    """Give a lock back, and remove its file."""
    if lock is not None:
        handle, path = lock
        path.unlink(missing_ok=True)
        os.close(handle)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory's lock, after whoever has it now."""
    lock = take_lock(directory, wait=True)
    try:
        yield
    finally:
        release_lock(lock)
