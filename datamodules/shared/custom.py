"""One's own data, which has one name in all families: `custom`, in `directory`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from datamodules.shared.splits import TEST, TRAIN, VALIDATION

CUSTOM = "custom"

# What the files of a split may be called, without suffix.
_FILE_NAMES = {TRAIN: ("train",), VALIDATION: ("dev", "validation", "valid", "val"), TEST: ("test",)}


def data_files(directory: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the files of a directory that look like data, in the order of their names."""
    return sorted(path for path in directory.iterdir() if path.suffix.lower() in suffixes and path.is_file())


def files_of_split(files: Iterable[Path], split: str) -> list[Path]:
    """Return the files that are named like a split, in upper or lower case."""
    return [path for path in files if path.stem.lower() in _FILE_NAMES[split]]


def expected_files(split: str, suffixes: Sequence[str]) -> str:
    """Return what a split's file may be called, for errors."""
    names = " or ".join(f"{name}{suffixes[0]}" for name in _FILE_NAMES[split])
    return f"{names} (or {', '.join(suffixes[1:])})"


def current_name(dataset: str, former: str) -> str:
    """Return the name of a data set; `former`, as `custom` was called in this family, still works and is logged."""
    if dataset != former:
        return dataset
    rank_zero_info(f"dataset '{former}' is called '{CUSTOM}' now")
    return CUSTOM
