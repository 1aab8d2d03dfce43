"""What a run reads, in one line for the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datamodules.glue.source import Examples
from datamodules.glue.tasks import TRAIN
from datamodules.glue.tokenization import TokenizedExamples


@dataclass(frozen=True)
class SetSummary:
    """One set of examples.

    Attributes:
        role: What it is for: train, val, test or predict, with the set's name where there is more than one.
        split: The split that it is from.
        size: Number of its examples.
        is_selection: Whether it decides on the best checkpoint.
        owner: Whose splits they are.
    """

    role: str
    split: str
    size: int
    is_selection: bool
    owner: str = "GLUE's"

    def __str__(self) -> str:
        if not self.is_selection:
            origin = f"{self.owner} {self.split.replace('_', ' ')} split"
        elif self.split == TRAIN:
            origin = "held out of train"
        else:
            origin = f"{self.owner} validation split, the one that is tested"
        return f"{self.role} {self.size:,} ({origin})"


def summarise(
    name: str, sets: Sequence[SetSummary], splits: Sequence[tuple[Examples, TokenizedExamples]], max_length: int, origin: str
) -> str:
    """Sizes, what was cut or left out, and where all is from."""
    total, cut = sum(len(examples) for examples, _ in splits), sum(tokens.num_truncated for _, tokens in splits)
    notes = [f"{cut:,} of {total:,} longer than {max_length} tokens, cut" if cut else f"none over {max_length} tokens"]
    if skipped := sum(examples.skipped for examples, _ in splits):
        notes.append(f"{skipped:,} line(s) with missing fields left out")
    return f"{name}: {', '.join(map(str, sets))}; {'; '.join(notes)}; from {origin}"
