"""Checkpoint files: written atomically, verified before they are read, restricted to tensors and plain values."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from fourier_moe.errors import UserError
from fourier_moe.files.writing import write_file

_MARK = b"fourier_moe sha256 "
_END_OF_ZIP = b"PK\x05\x06"  # begins the last 22 bytes of a zip archive that has no comment
_END_SIZE = 22
_POSITION = re.compile(rb"step (\d+) written (\d+) (whole|weights) " + re.escape(_MARK) + rb"[0-9a-f]{64}\Z")
_POSITION_SIZE = 200  # bytes at the end of a file; enough to contain it


@dataclass(frozen=True, order=True)
class Position:
    """How far training was when a checkpoint was written; the newer of two is the greater.

    The file itself records it, so copying or unpacking a run directory does not change it.

    Args:
        step: optimizer steps.
        written: time of writing in ns; orders checkpoints of the same step.
        whole: whether training can resume from it; weights alone (`save_weights_only`) lack the optimizer state.
    """

    step: int
    written: int
    whole: bool = field(compare=False)


class CheckedCheckpointIO(TorchCheckpointIO):
    """torch's format with step and checksum in the zip archive's comment; `torch.load` reads the files as usual.

    torch itself does not detect a flipped bit in a tensor. Files are written under a temporary name and then renamed, so a
    process that is killed at any moment leaves either the old file or the new one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None) -> None:
        """Write a checkpoint and flush it to disk.

        Raises:
            UserError: if the file cannot be written (a full disk, no permission); the file that was at `path` is kept.
        """
        if storage_options is not None:
            raise UserError(f"storage_options={storage_options!r} must be None")
        content = _with_checksum(checkpoint)
        if "://" in str(path):  # an object store, which shows whole objects only
            with fsspec.open(str(path), "wb") as file:
                file.write(content)
            return
        try:
            write_file(Path(path), content)
        except OSError as error:
            step, cause = checkpoint.get("global_step"), os.strerror(error.errno) if error.errno else error
            raise UserError(
                f"checkpoint {path} of step {step} cannot be written: {cause}; earlier checkpoints are intact. "
                "Free some space, then resume with --ckpt_path RUN_DIRECTORY, which takes the newest intact one"
            ) from error

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Verify the file, then read it without running code from it.

        Raises:
            UserError: if the file is damaged, or contains more than tensors and plain values.
        """
        if weights_only is False:
            raise UserError("weights_only=False would run code from a checkpoint; leave it out or set it to True")
        return read_checkpoint(path, map_location)


def read_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """Return the content of a checkpoint; raise UserError if it is damaged or contains code."""
    with fsspec.open(str(path), "rb") as file:
        content = file.read()
    problem = _problem(content)
    if problem:
        raise UserError(f"checkpoint {path} is damaged ({problem}); {_advice(Path(path))}")
    if not content[:-64].endswith(_MARK):
        rank_zero_warn(
            f"checkpoint {path} has no checksum (an older version or another program wrote it): damage goes unnoticed"
        )
    try:
        return torch.load(io.BytesIO(content), map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path} contains more than tensors and plain values; it is refused, since reading it could run code"
        ) from error


def is_intact(path: Path) -> bool:
    """Return whether a file is an undamaged checkpoint, without loading it."""
    return _problem(path.read_bytes()) is None


def position(path: Path) -> Position | None:
    """Return how far training was, without reading the weights; None for a file that is not a checkpoint or badly damaged."""
    with path.open("rb") as file:
        file.seek(-min(_POSITION_SIZE, path.stat().st_size), os.SEEK_END)
        found = _POSITION.search(file.read())
    if found:
        return Position(int(found[1]), int(found[2]), found[3] == b"whole")
    try:  # an older version or another program wrote it
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return Position(int(content["global_step"]), path.stat().st_mtime_ns, "optimizer_states" in content)
    except Exception:  # torch and pickle raise all kinds of errors for other files
        return None


def positions(*directories: Path) -> dict[Path, Position | None]:
    """Return all checkpoint files in or below the directories: unreadable ones, then the others from new to old."""
    paths = sorted({path for directory in directories for path in directory.rglob("*.ckpt")})
    found = {path: position(path) if path.is_file() else None for path in paths}
    unknown = {path: None for path, place in found.items() if place is None}
    known = {path: place for path, place in found.items() if place is not None}
    newest_first = sorted(known, key=lambda path: (known[path], path.stat().st_mtime_ns), reverse=True)
    return unknown | {path: known[path] for path in newest_first}


def newest_intact(*directories: Path, to_resume: bool = False) -> tuple[Path | None, list[str]]:
    """Find the newest undamaged checkpoint in or below the directories.

    Args:
        to_resume: skip checkpoints of weights alone.

    Returns:
        Its path (None if there is none), and the problems of files that may be newer.
    """
    problems: list[str] = []
    for path, place in positions(*directories).items():
        if to_resume and place is not None and not place.whole:
            continue
        problem = _problem(path.read_bytes()) if path.is_file() else "not a file"
        if problem is None and place is None:
            problem = "no training checkpoint"
        if problem is None:
            return path, problems
        problems.append(f"{path}: {problem}")
    return None, problems


def require_new(path: str | Path, option: str, kind: str) -> None:
    """Check that a path does not exist yet.

    Args:
        option: the option that sets it, for the message.
        kind: what it will be, `file` or `directory`.

    Raises:
        UserError: if it does.
    """
    if Path(path).exists():
        raise UserError(f"{option} {path} exists; give a new {kind}, or remove it first")


def require_writable(directory: Path, option: str) -> None:
    """Check that a directory, which may not exist yet, can be written to.

    Args:
        option: the option that sets it, for the message.

    Raises:
        UserError: if it cannot.
    """
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"0")
    except OSError as error:
        raise UserError(
            f"{directory} cannot be written to ({there}: {error.strerror}); choose another directory with {option} DIR"
        ) from error


def _with_checksum(checkpoint: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    # A zip archive ends with the length of its comment (2 bytes) and the comment.
    comment = _MARK
    if "global_step" in checkpoint:
        kind = "whole" if "optimizer_states" in checkpoint else "weights"
        comment = f"step {checkpoint['global_step']} written {time.time_ns()} {kind} ".encode() + _MARK
    buffer.seek(-2, os.SEEK_END)
    buffer.write((len(comment) + 64).to_bytes(2, "little") + comment)
    buffer.write(hashlib.sha256(buffer.getbuffer()).hexdigest().encode())
    return buffer.getvalue()


def _problem(content: bytes) -> str | None:
    """Return why these are not the bytes of an undamaged checkpoint, or None if they are."""
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
    return f"the newest intact checkpoint in this directory: {other}" if other else "this directory has no intact checkpoint"
