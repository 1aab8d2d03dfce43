"""The tables: the test sets of the language benchmarks and the training sets that go with them. A new one is a new row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from datamodules.instructions.answers.rules import (
    ANSWER,
    BOOLEAN,
    ENDING,
    LETTER,
    NUMBER,
    OPTION,
    SOLUTION,
    AnswerRule,
    Grade,
)

_ANSWER_FORMAT = re.compile(r"Answer format: (\S+)\s*$")  # how LLM-Adapters' questions end that have choices


class Benchmark:
    """A set of questions and how answers to them are graded.

    No dataclass: Lightning takes batches apart down to the fields of dataclasses, and refuses frozen ones.

    Args:
        name: of the set; the folder `dataset/<name>` holds its files.
        rule: how answers are read and compared.
        count: questions of the official test set, None if there is none.
        has_gold_output: whether the test file's `output` is right. Those of the mathematics sets were written by a model.
    """

    def __init__(self, name: str, rule: AnswerRule, *, count: int | None = None, has_gold_output: bool = True) -> None:
        self.name = name
        self.rule = rule
        self.count = count
        self.has_gold_output = has_gold_output

    def __repr__(self) -> str:
        return f"Benchmark({self.name!r})"

    @property
    def test_file(self) -> str:
        return f"dataset/{self.name}/test.json"

    @property
    def train_file(self) -> str:
        return f"dataset/{self.name}/train.json"

    def grade(self, output: str, answer: str) -> Grade:
        """Read the answer out of what a model wrote and compare it with the gold answer."""
        return self.rule.grade(output, answer)

    def choices(self, instruction: str) -> tuple[str, ...]:
        """Return the answers that this question offers (ARC has questions with 3, 4 and 5); empty where any may be given."""
        match = _ANSWER_FORMAT.search(instruction)
        offered = tuple(match.group(1).split("/")) if match else ()
        return offered if offered and set(offered) <= set(self.rule.choices) else self.rule.choices

    @staticmethod
    def response(choice: str) -> str:
        """Return the response that gives `choice` as the answer, as in training."""
        return f"the correct answer is {choice}"


@dataclass(frozen=True)
class TrainSet:
    """A training set of the table.

    Attributes:
        name: as `train` calls it.
        file: its path in LLM-Adapters' layout.
        count: its official number of records, None if not known here.
        contaminates: the test sets whose questions are known to be in it, and the note that their results get.
    """

    name: str
    file: str
    count: int | None = None
    contaminates: Mapping[str, str] = field(default_factory=dict)


def _mixed(name: str, count: int | None = None, **contaminates: str) -> TrainSet:
    return TrainSet(name, f"ft-training_set/{name}.json", count, contaminates)


def _by_name(rows: Sequence[Benchmark]) -> dict[str, Benchmark]:
    return {row.name: row for row in rows}


COMMONSENSE = _by_name(
    [
        Benchmark("boolq", BOOLEAN, count=3270),
        Benchmark("piqa", SOLUTION, count=1838),
        Benchmark("social_i_qa", ANSWER, count=1954),
        Benchmark("hellaswag", ENDING, count=10042),
        Benchmark("winogrande", OPTION, count=1267),
        Benchmark("ARC-Easy", ANSWER, count=2376),
        Benchmark("ARC-Challenge", ANSWER, count=1172),
        Benchmark("openbookqa", ANSWER, count=500),
    ]
)
MATH = _by_name(
    [
        Benchmark("AddSub", NUMBER, count=395, has_gold_output=False),
        Benchmark("AQuA", LETTER, count=254, has_gold_output=False),
        Benchmark("gsm8k", NUMBER, count=1319, has_gold_output=False),
        Benchmark("MultiArith", NUMBER, count=600, has_gold_output=False),
        Benchmark("SingleEq", NUMBER, count=508, has_gold_output=False),
        Benchmark("SVAMP", NUMBER, count=1000, has_gold_output=False),
    ]
)

_COMMONSENSE_TRAIN_COUNTS = {
    "boolq": 9427,
    "piqa": 16113,
    "social_i_qa": 33410,
    "hellaswag": 39905,
    "winogrande": 63238,
    "ARC-Easy": 2251,
    "ARC-Challenge": 1119,
    "openbookqa": 4957,
}
COMMONSENSE_TRAIN = (
    _mixed("commonsense_170k", sum(_COMMONSENSE_TRAIN_COUNTS.values())),
    _mixed("commonsense_15k"),
    *(TrainSet(name, COMMONSENSE[name].train_file, count) for name, count in _COMMONSENSE_TRAIN_COUNTS.items()),
)
# LLM-Adapters' own README says not to report the three sets with math_10k; it made the other two without those problems.
_MAWPS = "contaminated: math_10k includes problems of MAWPS, which this set is a part of"
MATH_TRAIN = (_mixed("math_10k", AddSub=_MAWPS, MultiArith=_MAWPS, SingleEq=_MAWPS), _mixed("math_7k"), _mixed("math_14k"))
