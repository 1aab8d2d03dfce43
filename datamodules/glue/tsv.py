"""GLUE's official tab-separated files. Quotation marks are data there, not syntax."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from datamodules.glue.benchmarks import GlueTask
from datamodules.glue.source import Examples, GlueSource
from datamodules.shared.splits import TEST
from datamodules.shared.text_files import not_utf8
from fourier_moe.errors import UserError

_LABEL_CHARACTERS_SHOWN = 40


class TsvFiles(GlueSource):
    """The files of one task: train.tsv, dev.tsv and test.tsv; for mnli the last two with `_matched` and `_mismatched`.

    Args:
        task: which task.
        files: the file of each split.
        folder: where they are, for errors.
    """

    def __init__(self, task: GlueTask, files: Mapping[str, Path], folder: Path) -> None:
        self.origin = f"'{folder}'"
        self.splits = frozenset(files)
        self._task, self._files = task, files

    def load(self, split: str) -> Examples:
        return read_tsv(self._files[split], self._task, split)

    def missing(self, split: str) -> str:
        return f"expected {tsv_name(split)} there"


def tsv_name(split: str) -> str:
    """Return the official name of a split's file; GLUE says dev for validation."""
    return f"{split.replace('validation', 'dev')}.tsv"


def find_tsv_files(folder: Path, task: GlueTask) -> dict[str, Path]:
    """Return the files by split."""
    return {split: folder / tsv_name(split) for split in task.all_splits if (folder / tsv_name(split)).is_file()}


def read_tsv(path: Path, task: GlueTask, split: str) -> Examples:
    """Read one file.

    Args:
        path: the file, in UTF-8 with or without byte-order mark.
        task: says what the columns are.
        split: its name, for the ids. A row's number counts from 0 and includes those that are left out.

    Raises:
        UserError: A column is missing, a line has too few or too many fields or an unknown label, or there are no lines.
    """
    layout = task.tsv
    assert layout is not None, "data of one's own has no official files"
    lines = _read_fields(path)
    if split.startswith(TEST):
        columns, label_column = _read_header(lines, path, layout.sentences, layout.test_columns), None
    elif layout.has_header:
        columns, label_column = _read_header(lines, path, (*layout.sentences, layout.label), layout.columns), layout.label
    else:
        columns, label_column = layout.columns, layout.label

    classes = {text: label for label, text in enumerate(layout.labels)}
    ids: list[str] = []
    sentences: list[list[str]] = [[] for _ in layout.sentences]
    labels: list[int] = []
    skipped = 0
    for number, (line, fields) in enumerate(lines):
        if len(fields) < len(columns) and layout.skips_short_lines:
            skipped += 1
            continue
        if len(fields) != len(columns):
            raise UserError(f"'{path}', line {line}: {len(fields)} fields where {len(columns)} are expected: {_join(columns)}")
        row = dict(zip(columns, fields, strict=True))
        if label_column is not None and row[label_column] not in classes:
            raise UserError(
                f"'{path}', line {line}: label '{row[label_column][:_LABEL_CHARACTERS_SHOWN]}' is unknown; "
                f"{task.folder} has {', '.join(classes)} in column {columns.index(label_column) + 1}"
            )
        ids.append(f"{split}/{number}")
        for column, name in zip(sentences, layout.sentences, strict=True):
            column.append(row[name])
        if label_column is not None:
            labels.append(classes[row[label_column]])
    if not ids:
        raise UserError(f"'{path}' has no examples of {split}; download it again")
    return Examples(ids, tuple(sentences), None if label_column is None else labels, skipped)


def _read_header(
    lines: Iterator[tuple[int, list[str]]], path: Path, needed: Sequence[str], official: Sequence[str]
) -> Sequence[str]:
    """Take the first line; an empty file has the official one."""
    _, columns = next(lines, (0, list(official)))
    absent = [name for name in needed if name not in columns]
    if absent:
        raise UserError(
            f"'{path}' has no column {_join(absent)}; its first line should be {_join(official)}, with tabs between"
        )
    if twice := [name for name in needed if list(columns).count(name) > 1]:
        raise UserError(f"'{path}' has more than one column {_join(twice)}")
    return columns


def _read_fields(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield line number, from 1, and fields of each line that is not blank."""
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if text := line.rstrip("\n"):
                    yield number, text.split("\t")
        except UnicodeDecodeError:
            raise not_utf8(path) from None


def _join(columns: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in columns)
