"""The table of GLUE tasks. What is known of each without having its data."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from datamodules.shared.custom import CUSTOM
from datamodules.shared.splits import TEST, TRAIN, VALIDATION
from fourier_moe.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TsvLayout:
    """The columns of a task's official tab-separated files.

    Attributes:
        columns: of train and validation files.
        test_columns: of test files, which have no labels.
        sentences: columns with the sentence or the two sentences.
        label: column with the label.
        labels: what the label column holds for each class, in the order of the classes.
        has_header: whether the first line of train and validation files names the columns; that of test files always does.
        skips_short_lines: whether lines with missing fields are known in the official files, and left out.
    """

    columns: tuple[str, ...]
    test_columns: tuple[str, ...]
    sentences: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    has_header: bool = True
    skips_short_lines: bool = False


@dataclass(frozen=True, kw_only=True)
class GlueTask:
    """One task.

    Attributes:
        folder: what it and its folder are called officially.
        class_names: the classes, in the hub's order; a label is an index into them.
        sentences: the hub's columns with the sentence or the two sentences.
        metrics: GLUE's metrics for it.
        sizes: number of examples of each split, as documentation.
        validation_sets: names of the evaluation sets, where there is more than one.
        tested: the split whose labels are known and that is tested: validation, for GLUE hides those of its test splits.
        tsv: its official files; None for data of one's own.
    """

    folder: str
    class_names: tuple[str, ...]
    sentences: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    sizes: Mapping[str, int] = field(default_factory=dict)
    validation_sets: tuple[str, ...] = ()
    tested: str = VALIDATION
    tsv: TsvLayout | None = None

    def splits(self, split: str) -> dict[str, str]:
        """Return the splits that "train", "validation" or "test" stands for, by set name; one task has two of the last two."""
        if split == TRAIN or not self.validation_sets:
            return {split: split}
        return {name: f"{split}_{name}" for name in self.validation_sets}

    @property
    def all_splits(self) -> list[str]:
        """Every split that the task has."""
        return [name for split in (TRAIN, VALIDATION, TEST) for name in self.splits(split).values()]


TASKS: dict[str, GlueTask] = {
    "cola": GlueTask(
        folder="CoLA",
        class_names=("unacceptable", "acceptable"),
        sentences=("sentence",),
        metrics=("accuracy", "matthews"),
        sizes={TRAIN: 8551, VALIDATION: 1043, TEST: 1063},
        tsv=TsvLayout(
            columns=("source", "label", "star", "sentence"),
            test_columns=("index", "sentence"),
            sentences=("sentence",),
            label="label",
            labels=("0", "1"),
            has_header=False,
        ),
    ),
    "sst2": GlueTask(
        folder="SST-2",
        class_names=("negative", "positive"),
        sentences=("sentence",),
        sizes={TRAIN: 67349, VALIDATION: 872, TEST: 1821},
        tsv=TsvLayout(
            columns=("sentence", "label"),
            test_columns=("index", "sentence"),
            sentences=("sentence",),
            label="label",
            labels=("0", "1"),
        ),
    ),
    "mrpc": GlueTask(
        folder="MRPC",
        class_names=("not_equivalent", "equivalent"),
        sentences=("sentence1", "sentence2"),
        metrics=("accuracy", "f1"),
        sizes={TRAIN: 3668, VALIDATION: 408, TEST: 1725},
        tsv=TsvLayout(
            columns=("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"),
            test_columns=("index", "#1 ID", "#2 ID", "#1 String", "#2 String"),
            sentences=("#1 String", "#2 String"),
            label="Quality",
            labels=("0", "1"),
        ),
    ),
    "qqp": GlueTask(
        folder="QQP",
        class_names=("not_duplicate", "duplicate"),
        sentences=("question1", "question2"),
        metrics=("accuracy", "f1"),
        sizes={TRAIN: 363846, VALIDATION: 40430, TEST: 390965},
        tsv=TsvLayout(
            columns=("id", "qid1", "qid2", "question1", "question2", "is_duplicate"),
            test_columns=("id", "question1", "question2"),
            sentences=("question1", "question2"),
            label="is_duplicate",
            labels=("0", "1"),
            skips_short_lines=True,
        ),
    ),
    "mnli": GlueTask(
        folder="MNLI",
        class_names=("entailment", "neutral", "contradiction"),
        sentences=("premise", "hypothesis"),
        sizes={
            TRAIN: 392702,
            "validation_matched": 9815,
            "validation_mismatched": 9832,
            "test_matched": 9796,
            "test_mismatched": 9847,
        },
        validation_sets=("matched", "mismatched"),
        tsv=TsvLayout(
            columns=(
                *("index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse"),
                *("sentence1_parse", "sentence2_parse", "sentence1", "sentence2", "label1", "gold_label"),
            ),
            test_columns=(
                *("index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse"),
                *("sentence1_parse", "sentence2_parse", "sentence1", "sentence2"),
            ),
            sentences=("sentence1", "sentence2"),
            label="gold_label",
            labels=("entailment", "neutral", "contradiction"),
        ),
    ),
    "qnli": GlueTask(
        folder="QNLI",
        class_names=("entailment", "not_entailment"),
        sentences=("question", "sentence"),
        sizes={TRAIN: 104743, VALIDATION: 5463, TEST: 5463},
        tsv=TsvLayout(
            columns=("index", "question", "sentence", "label"),
            test_columns=("index", "question", "sentence"),
            sentences=("question", "sentence"),
            label="label",
            labels=("entailment", "not_entailment"),
        ),
    ),
    "rte": GlueTask(
        folder="RTE",
        class_names=("entailment", "not_entailment"),
        sentences=("sentence1", "sentence2"),
        sizes={TRAIN: 2490, VALIDATION: 277, TEST: 3000},
        tsv=TsvLayout(
            columns=("index", "sentence1", "sentence2", "label"),
            test_columns=("index", "sentence1", "sentence2"),
            sentences=("sentence1", "sentence2"),
            label="label",
            labels=("entailment", "not_entailment"),
        ),
    ),
}


def find_task(name: str) -> tuple[str, GlueTask]:
    """Return the key and row of a task; SST-2 and sst2 are the same.

    Raises:
        UserError: there is no such row; names like it are suggested.
    """
    key = name.lower().replace("-", "")
    if key not in TASKS:
        near = difflib.get_close_matches(key, TASKS)
        suggestion = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise UserError(f"dataset '{name}' is unknown{suggestion}; choose one of {', '.join(TASKS)}, or {CUSTOM}")
    return key, TASKS[key]
