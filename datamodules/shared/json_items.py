"""Items of a JSON file: a list, or one object a line, whatever the file is called."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datamodules.shared.text_files import read_text
from fourier_moe.errors import UserError

SUFFIXES = (".json", ".jsonl", ".ndjson")

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # written as an escape, alone or in a pair
_HALF = re.compile("[\ud800-\udfff]")  # alone, which is no text that could be tokenized or written


def read_items(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield every item of a JSON list or of JSON lines, with its name in errors: `'a.json' record 3`, `'a.json' line 3`.

    Raises:
        UserError: the file is neither, an object has a key twice, or a text holds half of a surrogate pair.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        for number, item in enumerate(_parse(text, f"'{path}'"), start=1):
            yield f"'{path}' record {number}", item
        return
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if len(lines) > 1 and lines[0][1].strip() == "{":  # one object, spread over lines
        raise UserError(f"'{path}' holds a single object; expected a list of objects, or one object a line")
    for number, line in lines:
        yield f"'{path}' line {number}", _parse(line, f"'{path}' line {number}")


def read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the lines of a JSON file that are not empty, one by one, each with its name in errors.

    Raises:
        UserError: the file cannot be read, or is a list.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.removeprefix(codecs.BOM_UTF8).strip() if number == 1 else line.strip()
                if number == 1 and text.startswith(b"["):
                    raise UserError(f"'{path}' is a JSON list, which can only be read whole; write one object a line")
                if text:
                    yield f"'{path}' line {number}", text
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror})") from error


def parse_line(line: bytes, where: str) -> Any:
    """Return the item of a line.

    Raises:
        UserError: naming it, if it is no JSON in UTF-8.
    """
    try:
        return _parse(line.decode(), where)
    except UnicodeDecodeError:
        raise UserError(f"{where} is not UTF-8 text; save the file as UTF-8") from None


def shorten(value: object) -> str:
    """Return a value as errors show it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _parse(text: str, where: str) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=lambda _: None)  # NaN is a missing value
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise UserError(f"{where} is not valid JSON: {error.msg} at {place}") from error
    except RecursionError as error:
        raise UserError(f"{where} is not valid JSON: it is nested too deeply") from error
    except _KeyTwiceError as error:
        raise UserError(f"{where}: the key {shorten(error.args[0])} is there twice in one object") from error
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{where} cannot be read: {str(error).partition(';')[0]}") from error
    if _SURROGATE.search(text) and (half := _HALF.search(json.dumps(value, ensure_ascii=False))):
        raise UserError(f"{where} has half of a character, {half.group()!r}, as of an emoji that was cut; remove it")
    return value


class _KeyTwiceError(Exception):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _KeyTwiceError(next(key for key in keys if keys.count(key) > 1))
    return found
