"""Atomic writing of files: an interruption at any moment leaves the old file or the new one.

The content goes to a new file in the same directory, `.NAME.<32 hex digits>.part`, which is created exclusively: a file or a
link that is there already is neither followed nor deleted. It reaches the disk before it takes its place. A process that was
killed leaves such a file; the next one that replaces NAME removes it, unless its writer still holds the lock on it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, TypeAlias

FileParts: TypeAlias = Sequence[bytes | memoryview]

_LONGEST = 100  # bytes of NAME in the name of its new file, of which file systems take 255


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that replaces `path` when the body ends. If the body raises, nothing changes.

    Directories are made if missing.

    Raises:
        OSError: with the path, if it cannot be written; what was there before is kept.
    """
    with ExitStack() as stack:
        file, temporary = stack.enter_context(_new_file(path))
        yield file
        with _naming(path):
            _to_disk(file)
            os.replace(temporary, path)
    _after_replacing([path])


def write_file(path: Path, content: bytes | str) -> None:
    """Replace a file by `content`, text as UTF-8; see `replacing`."""
    with replacing(path) as file, _naming(path):
        file.write(content.encode() if isinstance(content, str) else content)


def replace_files(directory: Path, files: Mapping[str, FileParts], *, remove_first: Sequence[str] = ()) -> None:
    """Write files of a directory (made if missing), in parts each, and put them in place one after the other.

    All of them are on disk beside their places before the first is touched: a full disk changes nothing.

    Args:
        remove_first: files that must never stand beside a new first one while they are the old ones.

    Raises:
        OSError: with the path, if something cannot be written; what was there before is kept.
    """
    with ExitStack() as stack:
        written: dict[Path, Path] = {}
        for path, parts in ((directory / name, parts) for name, parts in files.items()):
            file, written[path] = stack.enter_context(_new_file(path))
            with _naming(path):
                file.writelines(parts)
                _to_disk(file)
        for name in remove_first:
            (directory / name).unlink(missing_ok=True)
        for path, temporary in written.items():
            with _naming(path):
                os.replace(temporary, path)
    _after_replacing(list(written))


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Make a new directory that is renamed to `path` when the body ends; if the body raises, it is removed.

    Raises:
        OSError: if `path` exists by then, or cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _name_beside(path)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists() or path.is_symlink():
            raise FileExistsError(17, "File exists", str(path))
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _new_file(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """Open a new locked file beside `path`, and yield it with its name; it is removed at the end if it still exists."""
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            temporary = _name_beside(path)
            file = open(temporary, "xb")  # noqa: SIM115 # closed below
            if _lock(file) is not False and temporary.exists():
                break
            file.close()  # another writer took it for abandoned in the moment before it was locked
    try:
        with file:
            yield file, temporary
    finally:
        temporary.unlink(missing_ok=True)


def _name_beside(path: Path) -> Path:
    return path.with_name(f".{_shortened(path.name)}.{uuid.uuid4().hex}.part")


def _shortened(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:_LONGEST])


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _lock(file: BinaryIO) -> bool | None:
    """Return whether the file is locked by us now; None where the file system has no locks. The lock ends with the process."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _after_replacing(paths: Sequence[Path]) -> None:
    """Remove what killed processes left, and sync the new names. Errors are ignored, since the files are in place."""
    with contextlib.suppress(OSError):
        for path in paths:
            _remove_abandoned(path)
        for directory in {path.parent for path in paths}:
            descriptor = os.open(directory, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    pattern = re.compile(rf"\.{re.escape(_shortened(path.name))}\.[0-9a-f]{{32}}\.part")
    with os.scandir(path.parent) as entries:
        abandoned = [entry for entry in entries if pattern.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)]
    for entry in abandoned:
        with contextlib.suppress(OSError), open(entry.path, "rb") as file:
            if _lock(file):
                os.unlink(entry.path)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in errors of the operating system."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; what was there before is kept", str(path)) from error
