"""Errors that tell a user what to change, and names from files made safe to show in them."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable

_CONTROL_CATEGORIES = {"Cc", "Cs", "Zl", "Zp"}  # control characters, surrogates, line and paragraph separators
_DIRECTIONS = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class UserError(ValueError):
    """What a user did wrong: the message names the argument, its value, and what would be valid.

    The command line prints it without a traceback. Every other error is a fault of this package and keeps its traceback.
    """


def printable(text: str) -> str:
    r"""Return the text with control characters, and bytes that are not text, written as escapes such as `\x1b`.

    A file name may hold anything: escape sequences that rewrite a terminal, marks that reverse the reading direction, line
    breaks, or bytes that are not UTF-8, which Python keeps as lone surrogates and no file in UTF-8 can hold.
    """
    if text.isprintable():
        return text
    return "".join(_escape(character) if _is_control(character) else character for character in text)


def shorten(texts: Iterable[str], limit: int = 3, separator: str = ", ") -> str:
    """Join the first texts and count the others: `a, b, c and 2 more`."""
    first = list(texts)
    more = f" and {len(first) - limit} more" if len(first) > limit else ""
    return separator.join(first[:limit]) + more


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in _CONTROL_CATEGORIES or character in _DIRECTIONS


def _escape(character: str) -> str:
    try:
        byte = os.fsencode(character)
    except UnicodeEncodeError:  # a surrogate that does not stand for a byte
        return character.encode("unicode_escape").decode("ascii")
    if len(byte) == 1:
        return f"\\x{byte[0]:02x}"
    return character.encode("unicode_escape").decode("ascii")
