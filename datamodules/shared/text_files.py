"""Text files of users, read whole, with errors that say what is wrong with them."""

from __future__ import annotations

import codecs
from pathlib import Path

from fourier_moe.errors import UserError

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, with or without a byte-order mark; line ends stay as they are.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or holds NUL characters.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror})") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise not_utf8(path) from None
    if "\0" in text:
        line = _line(text, text.index("\0"))
        raise UserError(f"'{path}' line {line} has a NUL character; save the file as UTF-8 text")
    return text


def not_utf8(path: Path) -> UserError:
    """Return what to say of a file that cannot be decoded: where it is not UTF-8, and what it may be instead."""
    content = path.read_bytes()
    if content.startswith(_UTF_16):
        return UserError(f"'{path}' is not UTF-8 text but UTF-16; save the file as UTF-8")
    try:
        content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = _line(content, error.start), content[error.start]
        return UserError(
            f"'{path}' is not UTF-8 text: line {line} has the byte 0x{byte:02x}, as in Windows-1252; save the file as UTF-8"
        )
    raise AssertionError("it is UTF-8")


def _line(content: str | bytes, end: int) -> int:
    """Return the number of the line, from 1, at a place of a file."""
    newline: str | bytes = "\n" if isinstance(content, str) else b"\n"
    return content.count(newline, 0, end) + 1  # type: ignore[arg-type]
