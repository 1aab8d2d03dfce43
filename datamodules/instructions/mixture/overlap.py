"""Test questions that were trained on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from datamodules.instructions.dataset import Example
from datamodules.instructions.reading.records import Record

_NO_LETTER_OR_DIGIT = re.compile(r"(?![-+*/]\s*\d|\.\d)\W")  # 1.2 - 3 and 12 + 3 are different questions


def question_key(record: Record) -> str:
    """Return a question, with its options, without case, white space and punctuation (but for that of numbers)."""
    return _NO_LETTER_OR_DIGIT.sub("", f"{record.instruction}{record.input}".lower())


def count_overlaps(train: Sequence[Example], tests: Mapping[str, Sequence[Example]]) -> dict[str, dict[str, int]]:
    """Return how many questions of each test set are in each training source, as {test set: {source: count}}; no zeros."""
    trained: dict[str, set[str]] = {}
    for example in train:
        trained.setdefault(str(example.task), set()).add(question_key(example.record))
    counts = {}
    for name, examples in tests.items():
        keys = [question_key(example.record) for example in examples]
        found = {source: sum(key in known for key in keys) for source, known in trained.items()}
        counts[name] = {source: count for source, count in found.items() if count}
    return counts
