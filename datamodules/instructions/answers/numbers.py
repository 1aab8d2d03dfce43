"""Numbers in plain text, as models write them: grouped digits, fractions, powers of ten."""

from __future__ import annotations

import math
import re

_SIGN = r"(?:-?[$€£¥₹]\s?|-?)-?"  # -$5 and $-5
_GROUPED = r"\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?: \d{3})+(?!\d)|\d{1,3}(?:\.\d{3}){2,}(?!\d)"
_DECIMAL = r"(?:\d+(?:\.\d+)?|\.\d+)"
_FRACTION = r"(?:\d+ \d{1,2}|\d+)\s?/\s?\d+(?![\d/]|\.\d)"  # 2 1/2, but not 1 000/2
_POWER = r"\d+\^-?\d{1,3}(?!\d)"
_SCIENTIFIC = rf"(?:{_GROUPED}|{_DECIMAL})(?:[eE][+-]?\d{{1,3}}(?!\w)|\s?[x*]\s?10\^[+-]?\d{{1,3}}(?!\d))"
_PAIR = r"(?<!\d,)\d+,\d+(?!,?\d)"  # 1,5: one number or two

_NUMBER = re.compile(
    rf"(?<![\w.^])(?P<sign>{_SIGN})(?:(?P<scientific>{_SCIENTIFIC})|(?P<power>{_POWER})|(?P<fraction>{_FRACTION})"
    rf"|(?P<grouped>{_GROUPED})(?P<decimals>\.\d+)?|(?P<pair>{_PAIR})|(?P<decimal>{_DECIMAL}))"
)
_ALTERNATIVE = re.compile(rf"\s*\bor\b\s*{_SIGN}\.?\d")
_JOINED = re.compile(rf"\s*(?:\bto\b|[-+*/x])\s*\(?{_SIGN}\.?\d")  # a range, or a calculation without its result


def first_number(text: str) -> str | None:
    """Return the first number of an answer, in a form that `float` reads; None where another one is offered or joined to it."""
    found = _NUMBER.search(text)
    if found is None or _ALTERNATIVE.match(text, found.end()) or _JOINED.match(text, found.end()):
        return None
    return _value(found)


def has_number(text: str) -> bool:
    """Return whether there is any number in the text."""
    return _NUMBER.search(text) is not None


def last_number(text: str) -> str | None:
    """Return the last number in a text, in a form that `float` reads; None where it is one of two alternatives (`3 or 4`)."""
    before, last = None, None
    for found in _NUMBER.finditer(text):
        before, last = last, found
    if last is None:
        return None
    if before is not None and (other := _ALTERNATIVE.match(text, before.end())) and other.end() > last.start():
        return None
    return _value(last)


def _value(found: re.Match[str]) -> str | None:
    """Return what a match of `_NUMBER` says; plain numbers as they are written, others as their value."""
    sign = "-" if "-" in found["sign"] else ""
    if found["decimal"]:
        return sign + found["decimal"]
    if found["grouped"]:
        return sign + re.sub(r"[ ,.]", "", found["grouped"]) + (found["decimals"] or "")
    try:
        value = _calculated(found)
    except (OverflowError, ValueError, ZeroDivisionError):  # int() refuses thousands of digits
        return None
    return f"{sign}{value:.12g}" if value is not None and math.isfinite(value) else None


def _calculated(found: re.Match[str]) -> float | None:
    if found["fraction"]:
        whole, numerator, denominator = re.fullmatch(r"(?:(\d+) )?(\d+)\s?/\s?(\d+)", found["fraction"]).groups()  # type: ignore[union-attr]
        return int(whole or 0) + int(numerator) / int(denominator)
    if found["power"]:
        base, exponent = found["power"].split("^")
        return float(base) ** int(exponent)
    if found["scientific"]:
        mantissa, exponent = re.split(r"[eE]|\s?[x*]\s?10\^", found["scientific"])
        return float(re.sub(r"[ ,]", "", mantissa)) * 10.0 ** int(exponent)
    return None  # a pair
