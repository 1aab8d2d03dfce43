"""One's own data, which has one name in all families: `custom`, in `directory`."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_info

from datamodules.shared.splits import TEST, TRAIN, VALIDATION

CUSTOM = "custom"

# What the files of a split may be called, without suffix.
FILE_NAMES = {TRAIN: ("train",), VALIDATION: ("dev", "validation", "valid", "val"), TEST: ("test",)}


def current_name(dataset: str, former: str) -> str:
    """The name of a data set; `former`, as `custom` was called in this family, still works and is logged."""
    if dataset != former:
        return dataset
    rank_zero_info(f"dataset '{former}' is called '{CUSTOM}' now")
    return CUSTOM
