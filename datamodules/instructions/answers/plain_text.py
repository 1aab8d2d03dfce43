r"""What models write around their answers (typography, LaTeX, Markdown), reduced to plain text for the strict rules."""

from __future__ import annotations

import re

ANSWER_MARK = "####"  # GSM8K's mark of an answer; what `plain_text` puts before the content of a LaTeX box

_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_MINUS = dict.fromkeys(map(ord, "\u2010\u2011\u2013\u2212\ufe63"), "-")  # hyphens, en dash, minus sign
_SPACES = dict.fromkeys([0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000], " ")
_INVISIBLE = dict.fromkeys([0xAD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x206A), 0xFEFF])
_OTHER = {ord("\u2019"): "'", ord("\u2044"): "/", ord("\u2215"): "/", ord("\u00f7"): "/", ord("\u00d7"): "*"}
_FRACTIONS = {0xBC: "1/4", 0xBD: "1/2", 0xBE: "3/4", 0x2153: "1/3", 0x2154: "2/3", 0x215B: "1/8"}
_TYPOGRAPHY = str.maketrans(
    _FULL_WIDTH | _MINUS | _SPACES | _INVISIBLE | _OTHER | {code: f" {text}" for code, text in _FRACTIONS.items()}
)
_SUPERSCRIPTS = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-")
_EXPONENT = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b]+")

_LATEX = (
    (re.compile(r"\\(?:left|right|displaystyle|!)(?![A-Za-z])"), ""),
    (re.compile(r"\\[()\[\]]"), ""),  # around formulas
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,;: ]|~"), " "),
    (re.compile(r"\\([$%#&])"), r"\1"),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "*"),
    (re.compile(r"\\(?:text|math|mbox)[a-z]*\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"(?<=\d)\s*\\[dt]?frac"), r" \\frac"),  # 2\frac{1}{2} is two and a half
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)"), r"\1/\2"),
    (re.compile(r"\^\s*\{([^{}]*)\}"), r"^\1"),
    (re.compile(r"\\f?box(?:ed)?\s*\{([^{}]*)\}"), rf" {ANSWER_MARK} \1\n"),
)


def plain_text(output: str) -> str:
    r"""Return the same text in ASCII digits, signs and spaces, without LaTeX commands and Markdown's `**`.

    `\boxed{x}` becomes a mark with x behind it, `\frac{1}{2}` and one half as a character `1/2`, a superscript `^2`.
    """
    text = output.translate(_TYPOGRAPHY)
    text = _EXPONENT.sub(lambda found: "^" + found.group().translate(_SUPERSCRIPTS), text)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text.replace("**", "")
