"""Locks between processes, also on several machines. A lock ends with the process that holds it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

Lock = tuple[int, Path]


def take_lock(directory: Path, wait: bool = False) -> Lock | None:
    """Lock a directory by a file beside it, `.<name>.lock`. Return None if the file system has no locks.

    Unlike those of flock, POSIX locks are not inherited by DataLoader workers, which outlive a killed run, and work over NFS.

    Args:
        wait: whether to wait until the lock is free.

    Raises:
        BlockingIOError: if another process holds the lock and `wait` is false.
        OSError: if the file cannot be created.
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
        os.close(handle)  # the previous holder has removed it


def release_lock(lock: Lock | None) -> None:
    """Release a lock and remove its file."""
    if lock is not None:
        handle, path = lock
        path.unlink(missing_ok=True)
        os.close(handle)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory's lock; wait until it is free."""
    lock = take_lock(directory, wait=True)
    try:
        yield
    finally:
        release_lock(lock)
