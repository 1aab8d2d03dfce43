"""A source is one GLUE task's data as they lie somewhere: its splits, their sentences, their labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Examples:
    """One split.

    Attributes:
        ids: `<split>/<row>`, unique.
        sentences: one list of N sentences, or two for pairs.
        labels: the class index of each example; None for test splits, whose labels are hidden.
        skipped: lines left out because fields are missing.
    """

    ids: Sequence[str]
    sentences: tuple[Sequence[str], ...]
    labels: Sequence[int] | None
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.ids)


class GlueSource(ABC):
    """One task's splits.

    Attributes:
        origin: where they come from, in words.
        splits: which there are: train, validation (or validation_matched, validation_mismatched), test likewise.
        revision: the commit of the hub's data set that they are from; None for other files.
    """

    origin: str
    splits: frozenset[str]
    revision: str | None = None

    def look_up(self) -> None:
        """Ask the origin for the newest version. By default does nothing."""
        return

    @abstractmethod
    def load(self, split: str) -> Examples:
        """Return the examples of one of `splits`."""

    @abstractmethod
    def missing(self, split: str) -> str:
        """Return what to give for a split that is not there, as the end of an error."""
