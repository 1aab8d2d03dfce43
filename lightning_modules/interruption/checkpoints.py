"""Checkpoint files: written whole or not at all, checked before they are read, tensors and numbers only."""

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
_POSITION_SIZE = 200  # bytes at the end of a file that surely hold it


@dataclass(frozen=True, order=True)
class Position:
    """How far training was when a checkpoint was written; the newer of two is the greater.

    The file itself records it, so that copying or unpacking a run directory changes nothing.

    Args:
        step: optimiser steps.
        written: time of writing in ns; tells two checkpoints of one step apart.
        whole: whether training can go on from it; a checkpoint of weights alone (`save_weights_only`) has no optimiser state.
    """

    step: int
    written: int
    whole: bool = field(compare=False)


class CheckedCheckpointIO(TorchCheckpointIO):
    """torch's format with step and checksum in the zip archive's comment; `torch.load` reads the files as usual.

    torch itself notices no flipped bit in a tensor. A file is written beside its place under another name and then moved
    there, so that a process killed at any moment leaves the old file or the new one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None) -> None:
        """Write a checkpoint and see it on the disk.

        Raises:
            UserError: if the file cannot be written (a full disk, no permission); what was at `path` is still there.
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
                f"checkpoint {path} of step {step} cannot be written: {cause}; earlier checkpoints are as they were. "
                "Make room there, then resume with --ckpt_path RUN_DIRECTORY, which takes the newest intact one"
            ) from error

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Check the file, then read it; code in it is never run.

        Raises:
            UserError: if the file is damaged, or holds other things than tensors and plain values.
        """
        if weights_only is False:
            raise UserError("weights_only=False would run code from a checkpoint; leave it out or set it to True")
        return read_checkpoint(path, map_location)


def read_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint's content, if its bytes are those that were written."""
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
            f"checkpoint {path} holds more than tensors and plain values; reading it could run code and is refused"
        ) from error


def is_intact(path: Path) -> bool:
    """Whether a file is a whole checkpoint as far as can be seen without loading it."""
    return _problem(path.read_bytes()) is None


def position(path: Path) -> Position | None:
    """How far training was, without reading the weights; None if the file is no checkpoint or is badly damaged."""
    with path.open("rb") as file:
        file.seek(-min(_POSITION_SIZE, path.stat().st_size), os.SEEK_END)
        found = _POSITION.search(file.read())
    if found:
        return Position(int(found[1]), int(found[2]), found[3] == b"whole")
    try:  # an older version or another program wrote it
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return Position(int(content["global_step"]), path.stat().st_mtime_ns, "optimizer_states" in content)
    except Exception:  # torch and pickle raise errors of any kind for files that are no checkpoints
        return None


def positions(*directories: Path) -> dict[Path, Position | None]:
    """Every checkpoint file in or below the directories, the newest first; before them files without a readable position."""
    paths = sorted({path for directory in directories for path in directory.rglob("*.ckpt")})
    found = {path: position(path) if path.is_file() else None for path in paths}
    unknown = {path: None for path, place in found.items() if place is None}
    known = {path: place for path, place in found.items() if place is not None}
    newest_first = sorted(known, key=lambda path: (known[path], path.stat().st_mtime_ns), reverse=True)
    return unknown | {path: known[path] for path in newest_first}


def newest_intact(*directories: Path, to_resume: bool = False) -> tuple[Path | None, list[str]]:
    """The undamaged checkpoint of the greatest step in or below the directories.

    Args:
        to_resume: leave out checkpoints of weights alone.

    Returns:
        Its path, None if there is none, and what is wrong with files that may be newer.
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


def require_writable(directory: Path, option: str) -> None:
    """Try to write where a directory is or will be.

    Args:
        option: which one it comes from, for the message.

    Raises:
        UserError: if that fails.
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
