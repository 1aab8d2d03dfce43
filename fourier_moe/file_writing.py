"""Replacing files so that an interruption leaves the old ones or the new ones."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

FileParts: TypeAlias = Sequence[bytes | memoryview]


def replace_files(directory: Path, files: Mapping[str, FileParts], *, remove_first: Sequence[str] = ()) -> None:
    """Write files of a directory (made if missing), in parts each, and put them in place one after the other.

    All of them are on disk beside their places before the first is touched: a full disk changes nothing.

    Args:
        remove_first: files that must never stand beside a new first one while they are the old ones.

    Raises:
        OSError: with the path, if something cannot be written; what was being written is removed.
    """
    temporary = {directory / name: directory / f"{name}.part" for name in files}
    try:
        _write_beside(directory, temporary, files)
        for name in remove_first:
            (directory / name).unlink(missing_ok=True)
        for path, part in temporary.items():
            os.replace(part, path)
    except BaseException:
        for part in temporary.values():
            if part.exists():
                part.unlink()
        raise


def _write_beside(directory: Path, temporary: Mapping[Path, Path], files: Mapping[str, FileParts]) -> None:
    path = directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path, parts in zip(temporary, files.values(), strict=True):
            with open(temporary[path], "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; what was there before is kept", str(path)) from error
