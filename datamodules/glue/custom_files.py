"""Rows of a user's own files: tables with tabs, commas or semicolons, or JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.shared.json_items import SUFFIXES as JSON_SUFFIXES
from datamodules.shared.json_items import read_items, shorten
from datamodules.shared.text_files import read_text
from fourier_moe.errors import UserError

_DELIMITERS = {".tsv": "\t", ".csv": ",;\t"}  # the first one with which the header makes sense
SUFFIXES = (*_DELIMITERS, *JSON_SUFFIXES)


def read_rows(path: Path, needed: Collection[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every row by column, with what to call it in an error.

    Args:
        path: A table whose first line names the columns, with quotation marks as Python's `csv.writer` and spreadsheets write
            them; or JSON objects, as a list or one a line.
        needed: columns by which the delimiter of a .csv file is recognized.

    Raises:
        UserError: the file is not such a file, has a column twice, or a row has too few or too many fields.
    """
    if path.suffix.lower() in JSON_SUFFIXES:
        for where, item in read_items(path):
            if not isinstance(item, dict):
                raise UserError(f'{where} is {shorten(item)}; expected an object such as {{"sentence": ..., "label": ...}}')
            yield where, item
        return
    text = read_text(path)
    delimiters = _DELIMITERS[path.suffix.lower()]
    delimiter = max(delimiters, key=lambda each: len(set(needed) & set(_header(text, each, path))))  # the first of equal ones
    columns = _header(text, delimiter, path)
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise UserError(f"'{path}' has more than one column '{twice[0]}'")
    rows = _records(text, delimiter, path)
    next(rows, None)
    for line, fields in rows:
        where = f"'{path}' line {line}"
        if len(fields) != len(columns):
            raise UserError(f"{where} has {len(fields)} fields where {len(columns)} are expected: {', '.join(columns)}")
        if delimiter == "\t" and any("\t" in field and "\n" in field for field in fields):
            raise UserError(f"{where}: a field begins with a quotation mark that is closed lines later; {_QUOTING}")
        yield where, dict(zip(columns, fields, strict=True))


_QUOTING = "a field that begins with one, or holds the delimiter, is put in quotation marks, and those within it are doubled"


def _header(text: str, delimiter: str, path: Path) -> Sequence[str]:
    _, columns = next(_records(text, delimiter, path), (0, []))
    return [name.strip() for name in columns]


def _records(text: str, delimiter: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the line, from 1, where each row that is not blank begins, and its fields."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        for fields in reader:
            if fields:
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"'{path}' line {line}: {error}; {_QUOTING}") from error
