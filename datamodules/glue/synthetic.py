"""Tiny generated GLUE files in the format of the real ones, for runs without data. A sentence's words give its class away."""

from __future__ import annotations

import random
from pathlib import Path

from datamodules.glue.benchmarks import GlueTask
from datamodules.glue.tsv import tsv_name
from datamodules.shared.splits import TEST, TRAIN, VALIDATION

NUM_EXAMPLES = {TRAIN: 80, VALIDATION: 16, TEST: 8}

_WORDS = (
    ("amber", "clay", "river", "stone", "valley"),
    ("brass", "engine", "gear", "piston", "valve"),
    ("chord", "drum", "flute", "rhythm", "violin"),
)


def write_tsv_files(folder: Path, task: GlueTask) -> None:
    """Write a file for every split of a task, the same in every process."""
    for split, count in NUM_EXAMPLES.items():
        for name in task.splits(split).values():
            (folder / tsv_name(name)).write_text(_generate(task, name, count), encoding="utf-8")


def _generate(task: GlueTask, split: str, count: int) -> str:
    source = random.Random(split)
    is_test = split.startswith(TEST)
    assert task.tsv is not None, "data of one's own is never generated"
    columns = task.tsv.test_columns if is_test else task.tsv.columns
    lines = [] if not (is_test or task.tsv.has_header) else ["\t".join(columns)]
    for number in range(count):
        label = number % len(task.class_names)
        fields = dict.fromkeys(columns, str(number))
        for column in task.tsv.sentences:
            fields[column] = f'The {" ".join(source.choices(_WORDS[label], k=source.randint(2, 6)))} is "here".'
        if not is_test:
            fields[task.tsv.label] = task.tsv.labels[label]
        lines.append("\t".join(fields.values()))
    return "\n".join(lines) + "\n"
