"""Checkpoint files: written whole or not at all, checked before they are read, tensors and numbers only."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from fourier_moe.file_writing import write_file

_MARK = b"fourier_moe sha256 "
_END_OF_ZIP = b"PK\x05\x06"  # begins the last 22 bytes of a zip archive that has no comment
_END_SIZE = 22


class CheckedCheckpointIO(TorchCheckpointIO):
    """torch's format with a checksum in the zip archive's comment; `torch.load` reads the files as ever.

    torch itself notices no flipped bit in a tensor. A file is written beside its place under another name and then moved
    there, so that a process killed at any moment leaves the old file or the new one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None) -> None:
        """Write a checkpoint and see it on the disk.

        Raises:
            RuntimeError: if the file cannot be written (a full disk, no permission); what was at `path` is still there.
        """
        if storage_options is not None:
            raise ValueError(f"storage_options={storage_options!r} must be None")
        content = _with_checksum(checkpoint)
        if "://" in str(path):  # an object store, which shows whole objects only
            with fsspec.open(str(path), "wb") as file:
                file.write(content)
            return
        try:
            write_file(Path(path), content)
        except OSError as error:
            step = checkpoint.get("global_step")
            raise RuntimeError(
                f"checkpoint {path} of step {step} cannot be written: {error.strerror}; earlier checkpoints are as they were. "
                "Make room there, then resume with --ckpt_path RUN_DIRECTORY, which takes the newest intact one"
            ) from error

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Check the file, then read it; code in it is never run.

        Raises:
            ValueError: if the file is damaged, or holds other things than tensors and plain values.
        """
        if weights_only is False:
            raise ValueError("weights_only=False would run code from a checkpoint; leave it out or set it to True")
        return read_checkpoint(path, map_location)


def read_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint's content, if its bytes are those that were written."""
    with fsspec.open(str(path), "rb") as file:
        content = file.read()
    problem = _problem(content)
    if problem:
        raise ValueError(f"checkpoint {path} is damaged ({problem}); {_advice(Path(path))}")
    if not content[:-64].endswith(_MARK):
        rank_zero_warn(
            f"checkpoint {path} has no checksum (an older version or another program wrote it): damage goes unnoticed"
        )
    try:
        return torch.load(io.BytesIO(content), map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint {path} holds more than tensors and plain values; reading it could run code and is refused"
        ) from error


def newest_intact(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint in or below a directory, and what is wrong with those that are newer."""
    problems: list[str] = []
    for path in sorted(directory.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        problem = _problem(path.read_bytes()) if path.is_file() else "not a file"
        if problem is None:
            return path, problems
        problems.append(f"{path}: {problem}")
    return None, problems


def require_writable(directory: Path, option: str) -> None:
    """Try to write where a directory is or will be.

    Args:
        option: which one it comes from, for the message.

    Raises:
        ValueError: if that fails.
    """
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"0")
    except OSError as error:
        raise ValueError(
            f"{directory} cannot be written to ({there}: {error.strerror}); choose another directory with {option} DIR"
        ) from error


def _with_checksum(checkpoint: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    # A zip archive ends with the length of its comment (2 bytes) and the comment.
    buffer.seek(-2, os.SEEK_END)
    buffer.write((len(_MARK) + 64).to_bytes(2, "little") + _MARK)
    buffer.write(hashlib.sha256(buffer.getbuffer()).hexdigest().encode())
    return buffer.getvalue()


def _problem(content: bytes) -> str | None:
    """What shows that these are not the bytes of a whole checkpoint."""
    if content[:-64].endswith(_MARK):
        intact = hashlib.sha256(memoryview(content)[:-64]).hexdigest().encode() == content[-64:]
        return None if intact else "its checksum differs"
    if not content:
        return "it is empty"
    if not (content[-_END_SIZE:].startswith(_END_OF_ZIP) and content.endswith(b"\x00\x00")):
        return "it is cut off, or no checkpoint"
    return None


def _advice(path: Path) -> str:
    other, _ = newest_intact(path.parent)
    return f"the newest intact one beside it: {other}" if other else "there is no intact one beside it"
