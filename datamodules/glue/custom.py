"""A user's own labeled sentences as one more task, described by the files themselves."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.glue.benchmarks import GlueTask
from datamodules.glue.custom_files import SUFFIXES, read_rows
from datamodules.glue.source import Examples, GlueSource
from datamodules.shared.custom import CUSTOM, data_files, expected_files, files_of_split
from datamodules.shared.json_items import shorten
from datamodules.shared.splits import TEST, TRAIN, VALIDATION
from fourier_moe.errors import UserError, printable

_LABEL, _SENTENCE, _PAIR = "label", ("sentence",), ("sentence1", "sentence2")


class CustomSentences(GlueSource):
    """Files of a directory: train, dev (or validation, valid, val) and test, each as .tsv, .csv, .json, .jsonl or .ndjson.

    Needed are `sentence`, or `sentence1` and `sentence2`, and `label`; further columns are ignored. The classes are the labels
    of the train file, without white space around them, in alphabetical order. A test file may have labels: then it is what is
    tested, and the dev file decides on the best checkpoint.

    Args:
        directory: where the files are.

    Attributes:
        task: its description, as of a task of GLUE.

    Raises:
        UserError: A file or a column is missing, a file or a line of it cannot be read, a sentence or a label is empty, labels
            differ in spelling only, a label is not among train's, or there are fewer than two classes.
    """

    def __init__(self, directory: Path) -> None:
        files, others = _find_files(directory)
        sentences = _sentence_columns(files[TRAIN])
        rows = {split: _read(path, sentences, needs_label=split != TEST) for split, path in files.items()}
        classes = _class_names(rows[TRAIN])
        tested = TEST if TEST in rows and rows[TEST].labels is not None else VALIDATION
        if tested not in rows:
            raise UserError(
                f"directory '{directory}' has nothing to test beside its train file; add a dev file, or a test file with labels"
            )
        self.task = GlueTask(folder=directory.name, class_names=classes, sentences=sentences, tested=tested)
        self.splits = frozenset(files)
        names = ", ".join(path.name for path in files.values())
        self.origin = f"'{directory}' ({names}{'; not read: ' if others else ''}{', '.join(others)})"
        self._examples = {split: _examples(split, rows[split], classes, files[TRAIN]) for split in files}

    def load(self, split: str) -> Examples:
        return self._examples[split]

    def missing(self, split: str) -> str:
        return f"expected {expected_files(split, SUFFIXES)} there"


@dataclass(frozen=True)
class _Rows:
    """What a file holds of N examples.

    Attributes:
        where: what to call each row in an error.
        sentences: one list of N sentences, or two.
        labels: the label of each; None for a test file without labels.
    """

    where: Sequence[str]
    sentences: tuple[Sequence[str], ...]
    labels: Sequence[str] | None


def _find_files(directory: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the file of each split, and the names of other files that look like data."""
    if not directory.is_dir():
        raise UserError(
            f"directory '{directory}' does not exist; expected a directory with {expected_files(TRAIN, SUFFIXES)}, dev and test"
        )
    data = data_files(directory, SUFFIXES)
    files: dict[str, Path] = {}
    for split in (TRAIN, VALIDATION, TEST):
        found = files_of_split(data, split)
        if len(found) > 1:
            raise UserError(f"directory '{directory}' has {' and '.join(path.name for path in found)}; leave one {split} file")
        if found:
            files[split] = found[0]
    if TRAIN not in files:
        there = ", ".join(path.name for path in data) or "no such file"
        raise UserError(
            f"dataset '{CUSTOM}' needs {expected_files(TRAIN, SUFFIXES)} in directory '{directory}'; there is {there}"
        )
    return files, [path.name for path in data if path not in files.values()]


def _sentence_columns(path: Path) -> tuple[str, ...]:
    """Return whether examples are sentences or pairs, by the first row of the train file."""
    _, row = next(read_rows(path, {*_SENTENCE, *_PAIR, _LABEL}), ("", {}))
    found = [names for names in (_SENTENCE, _PAIR) if set(names) <= set(row)]
    if len(found) != 1 or _LABEL not in row:
        both = "both sentence and sentence1, sentence2" if len(found) == 2 else f"columns {', '.join(map(str, row)) or 'none'}"
        raise UserError(f"'{path}' has {both}; expected sentence, or sentence1 and sentence2, and {_LABEL}")
    return found[0]


def _read(path: Path, columns: Sequence[str], *, needs_label: bool) -> _Rows:
    where: list[str] = []
    sentences: list[list[str]] = [[] for _ in columns]
    labels: list[str] = []
    has_label = needs_label
    for number, (place, row) in enumerate(read_rows(path, {*columns, _LABEL})):
        has_label = has_label or (number == 0 and _LABEL in row)
        needed = (*columns, _LABEL) if has_label else tuple(columns)
        if absent := [name for name in needed if row.get(name) is None]:
            raise UserError(f"{place} has no {', '.join(absent)}; its columns are {', '.join(map(str, row)) or 'none'}")
        if not has_label and row.get(_LABEL) is not None:
            raise UserError(f"{place} has a {_LABEL}, and {where[0]} has none; give all examples of the file one, or none")
        where.append(place)
        for column, name in zip(sentences, columns, strict=True):
            column.append(_sentence(row[name], name, place))
        if has_label:
            labels.append(_label(row, place))
    if not where:
        raise UserError(f"'{path}' has no examples")
    return _Rows(where, tuple(sentences), labels if has_label else None)


def _sentence(value: object, name: str, place: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}: {name} is {shorten(value)}; expected text")
    if not value.strip():
        raise UserError(f"{place}: {name} is empty")
    return value


def _label(row: Mapping[str, Any], place: str) -> str:
    """Return a label as stripped text; in JSON it may be a number (1 and 1.0 are the same) or a boolean."""
    value = row[_LABEL]
    if isinstance(value, bool):
        value = str(value).lower()
    elif isinstance(value, int | float):
        value = str(int(value) if math.isfinite(value) and value == int(value) else value)
    if not isinstance(value, str) or not value.strip() or printable(value.strip()) != value.strip():
        raise UserError(f"{place}: label is {shorten(row[_LABEL])}; expected the name of a class")
    return value.strip()


def _class_names(train: _Rows) -> tuple[str, ...]:
    """Return the labels of the train file, in alphabetical order."""
    assert train.labels is not None
    first: dict[str, str] = {}  # place of each label
    for label, place in zip(train.labels, train.where, strict=True):
        first.setdefault(label, place)
    spelled: dict[object, str] = {}
    for label in sorted(first):
        other = spelled.setdefault(_spelling(label), label)
        if other != label:
            raise UserError(
                f"{first[other]} has label {other!r}, {first[label]} {label!r}: they would be two classes; write them alike"
            )
    if len(first) < 2:
        raise UserError(f"{train.where[0]}: label {train.labels[0]!r} is the only one in this file; two or more are needed")
    return tuple(sorted(first))


def _spelling(label: str) -> object:
    """Return a key that is the same for labels of one class: `1` and `1.0`, `Pos` and `pos`."""
    try:
        number = float(label)
    except ValueError:
        number = math.nan
    return number if math.isfinite(number) else " ".join(unicodedata.normalize("NFKC", label).casefold().split())


def _examples(split: str, rows: _Rows, classes: Sequence[str], train: Path) -> Examples:
    ids = [f"{split}/{number}" for number in range(len(rows.where))]
    if rows.labels is None:
        return Examples(ids, rows.sentences, None)
    places = {name: index for index, name in enumerate(classes)}
    for place, label in zip(rows.where, rows.labels, strict=True):
        if label not in places:
            raise UserError(f"{place}: label {shorten(label)} is not among those of '{train}': {', '.join(classes)}")
    return Examples(ids, rows.sentences, [places[label] for label in rows.labels])
