"""From what a model wrote to its answer, and from there to right or wrong.

Every rule reads an output twice. `extract` is the rule of the published figures (LLM-Adapters' evaluation scripts), exactly.
`extract_strict` reads what the output says its answer is; where the two accuracies differ much, the published rule flatters.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from datamodules.instructions.answers.numbers import first_number, has_number, last_number
from datamodules.instructions.answers.plain_text import ANSWER_MARK, plain_text

TOLERANCE = 0.001  # between numbers that count as equal

_NEXT_TURN = re.compile(r"\n[^\S\n]*(?:### |Question:)")  # a model that was not taught to stop asks itself the next question
_ANSWER = rf"(?:answer\s*(?:is\s*:?|:)|{ANSWER_MARK})\s*"
_NEGATION = r"\b(?:not|never|cannot|\w+n't)\s+(?:(?:be|a|the|necessarily|always|really|quite)\s+)?"
_OR = r"\W{0,2}\s*(?:\bor\b|\band\b|/|,)\s*\W{0,2}"  # what joins two answers that are offered side by side
_SENTENCE_END = re.compile(r"\n|[.!?](?:\s|$)")


@dataclass(frozen=True)
class Grade:
    """The answers in an output (None where it has none) by the published and by the strict rule, and whether they are right."""

    extracted: str | None
    correct: bool
    strict_extracted: str | None
    strict_correct: bool


class AnswerRule(ABC):
    """How answers of one form are found in outputs and compared.

    Attributes:
        choices: the words to choose from; empty where the answer is a letter, a number or a text.
        expected: what a gold answer is, in words.
    """

    choices: tuple[str, ...] = ()
    expected: str

    @abstractmethod
    def is_answer(self, answer: str) -> bool:
        """Return whether `answer` has the form of a gold answer."""

    @abstractmethod
    def extract(self, output: str) -> str | None:
        """Return the answer by the rule of the published figures."""

    @abstractmethod
    def extract_strict(self, output: str) -> str | None:
        """Return the answer that the output commits itself to, in its first turn."""

    def agrees(self, extracted: str, answer: str) -> bool:
        """Return whether an extracted answer is the gold answer."""
        return extracted == answer

    def grade(self, output: str, answer: str) -> Grade:
        """Read both answers out of `output` and compare them with the gold `answer`."""
        extracted, strict = self.extract(first_response(output)), self.extract_strict(first_turn(output))
        return Grade(
            extracted,
            extracted is not None and self.agrees(extracted, answer),
            strict,
            strict is not None and self.agrees(strict, answer),
        )


class ChoiceRule(AnswerRule):
    """One of a few words such as `answer1` or `true`.

    Published: the first place where any of them stands, even inside a word (`untrue`, `answer15`) or in a list of all of them.
    Strict, in any case (`True`, `Answer 1`): the one after the last "answer is" or in the last LaTeX box; else the only one
    that is named as a word of its own and not after "not". Two that are offered side by side (`true or false`) are none.

    Args:
        choices: the words.
        synonyms: words that stand for a choice where an answer is expected: after "answer is", or first in the output.
    """

    def __init__(self, *choices: str, synonyms: Mapping[str, str] | None = None) -> None:
        self.choices = choices
        self.expected = f"one of {', '.join(choices)}"
        self._synonyms = dict(synonyms or {})
        self._published = re.compile("|".join(map(re.escape, choices)))
        spelled = "|".join(re.sub(r"(?<=[a-z])(?=\d)", "[ _-]?", choice) for choice in choices)
        word = rf"\b({spelled})\b(?!\.?\d)"
        short = rf"\b({'|'.join(self._synonyms) or '(?!)'})(?=\s*(?:[.,;:!)\"'\n]|$))"
        self._explicit = re.compile(rf"{_ANSWER}\W{{0,2}}(?:{word}|{short})", re.IGNORECASE)
        self._alternative = re.compile(rf"{_OR}{word}", re.IGNORECASE)
        self._named = re.compile(rf"({_NEGATION})?{word}", re.IGNORECASE)
        self._beginning = re.compile(rf"\W{{0,2}}{short}", re.IGNORECASE)

    def is_answer(self, answer: str) -> bool:
        return answer in self.choices

    def extract(self, output: str) -> str | None:
        match = self._published.search(output)
        return match.group() if match else None

    def extract_strict(self, output: str) -> str | None:
        text = plain_text(output)
        explicit = list(self._explicit.finditer(text))
        if explicit:
            other = self._alternative.match(text, explicit[-1].end())
            return _only([self._choice(found) for found in (explicit[-1], other) if found])
        found = [self._choice(named) for named in self._named.finditer(text) if not named.group(1)]
        beginning = self._beginning.match(text)
        return _only([*found, self._choice(beginning)] if beginning else found)

    def _choice(self, found: re.Match[str]) -> str:
        """Return the choice in the last group of a match."""
        word = re.sub(r"[ _-]", "", found.group(found.lastindex or 0).lower())
        return self._synonyms.get(word, word)


class LetterRule(AnswerRule):
    """The letter of an option, A to E.

    Published: the first of these capital letters anywhere, which for "A train ..." or "Because" is no answer at all.
    Strict: the letter of the last "answer is", LaTeX box or "B is correct"; else one that the output begins with ("B",
    "(B) 12", "b) 12"); else the only one in parentheses, in bold or after "option". Two that are offered side by side
    ("A or B") are none.
    """

    letters: ClassVar[str] = "ABCDE"
    expected = "a letter from A to E"

    _explicit = re.compile(
        r"(?i:(?:answer|option|choice)\s*(?:is\s*:?|:)\s*(?:the\s+)?(?:(?:option|choice|letter)\s*)?)\W{0,2}"
        r"(?:([A-E])\b(?!')|([a-e])\))"
        rf"|{ANSWER_MARK}\s*(?i:(?:option|choice)\s*)?\(?([A-Ea-e])\)?(?=\s*(?:[.:)]|$))"
        r"|(?<!\bor )(?<!\bor \()(?<!\bnor )(?<!\bnor \()(?<!\band )(?<!\band \()\b([A-E])\)?\s+is\s+(?:the\s+)?"
        r"(?:correct|right|best|answer)\b",
        re.MULTILINE,
    )
    _beginning = re.compile(r"\(?(?:([A-E])(?:\)|[.:]|\s*$)|([a-e])(?:\)|[.:]\s|[.:]?\s*$))")
    _named = re.compile(r"\(([A-E])\)|(?:\*{1,3}|__?)\(?([A-E])(?=[).:*_])|\b(?i:option|choice)\s+\(?([A-E])\b(?!')")
    _alternative = re.compile(rf"{_OR}(?i:(?:option|choice)\s+)?([A-E])\b(?!')")

    def is_answer(self, answer: str) -> bool:
        return len(answer) == 1 and answer in self.letters

    def extract(self, output: str) -> str | None:
        match = re.search(f"[{self.letters}]", output)
        return match.group() if match else None

    def extract_strict(self, output: str) -> str | None:
        text = plain_text(output)
        explicit = list(self._explicit.finditer(text))
        committed = explicit[-1] if explicit else self._beginning.match(text)
        if committed:
            other = self._alternative.match(text, committed.end())
            return _only([_letter(found) for found in (committed, other) if found])
        return _only([_letter(found) for read in (text, output) for found in self._named.finditer(read)])  # output: in bold


class NumberRule(AnswerRule):
    r"""A number, right within 0.001.

    Published: the last number once all commas are gone, wherever it stands ("5 apples, see step 2" gives 2; "8-3" gives -3).
    Strict: the number in the sentence after the last "answer is" or "####" or in the last LaTeX box (after its last "=", if it
    calculates); else the last one. A sign belongs to a number only if no number comes before it, commas and spaces only
    between groups of three digits. Fractions (`1/2`, `\frac{1}{2}`) and powers of ten (`1.5e3`) are read as their value. Two
    numbers that are offered side by side ("3 or 4", and after "answer is" also "3-4") are none, and so is "1,5".
    """

    expected = "a number"

    _published = re.compile(r"-?\d+\.?\d*")
    _marker = re.compile(_ANSWER, re.IGNORECASE)

    def is_answer(self, answer: str) -> bool:
        try:
            return math.isfinite(_number(answer))
        except ValueError:
            return False

    def extract(self, output: str) -> str | None:
        return _last(self._published.findall(output.replace(",", "")))

    def extract_strict(self, output: str) -> str | None:
        text = plain_text(output)
        markers = list(self._marker.finditer(text))
        if markers:
            sentence = _SENTENCE_END.split(text[markers[-1].end() :].lstrip(), maxsplit=1)[0].rpartition("=")[2]
            if has_number(sentence):
                return first_number(sentence)
        return last_number(text)

    def agrees(self, extracted: str, answer: str) -> bool:
        return abs(_number(extracted) - _number(answer)) <= TOLERANCE


class TextRule(AnswerRule):
    """Any text: the whole output, but for white space; strict: its first turn only. For users' own data."""

    expected = "a text"

    def is_answer(self, answer: str) -> bool:
        return bool(answer.strip())

    def extract(self, output: str) -> str | None:
        return " ".join(output.split()) or None

    extract_strict = extract

    def agrees(self, extracted: str, answer: str) -> bool:
        return extracted == " ".join(answer.split())


BOOLEAN = ChoiceRule("true", "false", synonyms={"yes": "true", "no": "false"})
SOLUTION = ChoiceRule("solution1", "solution2")
ANSWER = ChoiceRule("answer1", "answer2", "answer3", "answer4", "answer5")
ENDING = ChoiceRule("ending1", "ending2", "ending3", "ending4")
OPTION = ChoiceRule("option1", "option2")
LETTER = LetterRule()
NUMBER = NumberRule()
TEXT = TextRule()


def rule_of(answer: str) -> AnswerRule:
    """Return the rule for a gold answer of a mixed training file, by the answer's form."""
    return next(rule for rule in (BOOLEAN, SOLUTION, ANSWER, ENDING, OPTION, LETTER, NUMBER, TEXT) if rule.is_answer(answer))


def first_response(output: str) -> str:
    """Return what the published rules read: LLM-Adapters' scripts stop where the model writes the next `### Response:`."""
    return output.split("### Response:", maxsplit=1)[0].strip()


def first_turn(output: str) -> str:
    """Return an output up to where the model begins to write the next question."""
    return _NEXT_TURN.split("\n" + output, maxsplit=1)[0].strip() or output.strip()


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def _letter(found: re.Match[str]) -> str:
    """Return the letter in the group that took part in a match."""
    return found.group(found.lastindex or 0).upper()


def _last(found: Sequence[str]) -> str | None:
    return found[-1] if found else None


def _only(found: Sequence[str]) -> str | None:
    return found[0] if len(set(found)) == 1 else None
