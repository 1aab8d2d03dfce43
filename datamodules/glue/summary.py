"""What a run reads, in one line for the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datamodules.glue.source import Examples
from datamodules.glue.tokenization import TokenizedExamples
from datamodules.shared.splits import TRAIN

MAX_CLASSES = 20  # that are named


@dataclass(frozen=True)
class SetSummary:
    """One set of examples.

    Attributes:
        role: what it is for: train, val, test or predict, with the set's name where there is more than one.
        split: the split that it is from.
        size: number of its examples.
        is_selection: whether it decides on the best checkpoint.
        is_tested: whether it is from the split that is tested.
        owner: whose splits they are.
    """

    role: str
    split: str
    size: int
    is_selection: bool
    is_tested: bool
    owner: str = "GLUE's"

    def __str__(self) -> str:
        if not self.is_selection:
            origin = f"{self.owner} {self.split.replace('_', ' ')} split"
        elif self.split == TRAIN:
            origin = "held out of train"
        else:
            origin = f"{self.owner} {self.split.replace('_', ' ')} split" + (
                ", the one that is tested" if self.is_tested else ""
            )
        return f"{self.role} {self.size:,} ({origin})"


def summarize(
    name: str,
    class_names: Sequence[str],
    sets: Sequence[SetSummary],
    splits: Sequence[tuple[Examples, TokenizedExamples]],
    max_length: int,
    origin: str,
    incomplete: Sequence[str] = (),
) -> str:
    """Return a summary of sizes, classes, cut, left-out and missing examples, and origins."""
    total, cut = sum(len(examples) for examples, _ in splits), sum(tokens.num_truncated for _, tokens in splits)
    notes = [f"{cut:,} of {total:,} longer than {max_length} tokens, cut" if cut else f"none over {max_length} tokens"]
    if skipped := sum(examples.skipped for examples, _ in splits):
        notes.append(f"{skipped:,} line(s) with missing fields left out")
    classes = ", ".join(class_names[:MAX_CLASSES]) + (", ..." if len(class_names) > MAX_CLASSES else "")
    notes.insert(0, f"{len(class_names):,} classes: {classes}")
    return f"{name}: {', '.join(map(str, sets))}; {'; '.join([*notes, *incomplete])}; from {origin}"
