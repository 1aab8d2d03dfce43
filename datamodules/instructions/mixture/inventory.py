"""What a run's sources hold: lines for its log and notes for its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from datamodules.instructions.benchmarks import TrainSet
from datamodules.instructions.dataset import Example
from datamodules.instructions.mixture.loading import load_examples
from datamodules.instructions.mixture.mixing import Source
from datamodules.instructions.mixture.overlap import count_overlaps
from datamodules.instructions.reading.source import Files


class Inventory:
    """Reads sources and collects notes on them.

    Args:
        train: the training sources.
        train_sets: rows of the table, with what they contaminate.
        columns: what the fields of custom data are called, where they have other names.

    Attributes:
        lines: about what was read, for the log.
    """

    def __init__(
        self, train: Sequence[Source], train_sets: Sequence[TrainSet], columns: Mapping[str, str] | None = None
    ) -> None:
        self._columns = columns
        named = {source.name for source in train if not source.custom}
        self._trained = [row for row in train_sets if row.name in named]
        self._test_counts: dict[str, int] = {}
        self._overlaps: dict[str, dict[str, int]] = {}
        self.lines: list[str] = []

    def is_compared(self, test: Source) -> bool:
        """Return whether a test set's questions have been looked for in the training sources."""
        return test.name in self._overlaps

    def read(self, sources: Sequence[Source], files: Files, role: str) -> list[Example]:
        """Return the examples of all sources, for role train, validation or test.

        Raises:
            UserError: a file is missing or malformed.
        """
        examples: list[Example] = []
        for source in sources:
            found, left_out = load_examples(source, files, is_train=role == "train", columns=self._columns)
            examples += found
            weight = "" if source.weight == 1 else f", {source.weight:g} times an epoch"
            official = f" (the complete set has {source.count:,})" if source.count not in (None, len(found)) else ""
            silent = f", {left_out:,} left out that have no response to learn" if left_out else ""
            self.lines.append(f"  {role} {source.name}: {len(found):,}{official}{weight}{silent}")
            if role == "test":
                self._test_counts[source.name] = len(found)
        return examples

    def compare(self, train: Sequence[Example], tests: Mapping[str, Sequence[Example]]) -> None:
        """Look for the test sets' questions among the training examples."""
        found = count_overlaps(train, tests)
        self._overlaps |= found
        for name, overlaps in found.items():
            self.lines += [f"  {n:,} question(s) of test {name} are in train {source}" for source, n in overlaps.items()]

    def note(self, test: Source, *, is_validated: bool) -> str:
        """Return what a reader of a test set's results has to know; empty for nothing."""
        notes = []
        count = self._test_counts.get(test.name)
        if count is not None and test.count not in (None, count):
            notes.append(f"{count:,} of the official {test.count:,} questions")
        notes += [row.contaminates[test.name] for row in self._trained if test.name in row.contaminates]
        overlaps = self._overlaps.get(test.name, {})
        notes += [f"{count:,} of its questions also in train {train}" for train, count in overlaps.items()]
        if is_validated:
            notes.append("also validated on")
        return "; ".join(notes)
