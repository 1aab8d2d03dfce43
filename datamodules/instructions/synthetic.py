"""Tiny generated files in the layout and the fields of the real ones, for runs without data."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

from datamodules.instructions.answers.rules import LETTER, NUMBER, ChoiceRule
from datamodules.instructions.benchmarks import Benchmark, TrainSet
from datamodules.instructions.reading.records import Record

TRAIN_RECORDS, TEST_RECORDS = 160, 8  # of a set


def write_synthetic(directory: Path, benchmarks: Iterable[Benchmark], train_sets: Iterable[TrainSet]) -> None:
    """Write `dataset/<set>/test.json` for every benchmark, and every training set with questions of all kinds.

    A training set that is one benchmark's own has questions of that kind only.
    """
    benchmarks = tuple(benchmarks)
    for benchmark in benchmarks:
        _write(directory / benchmark.test_file, _questions(benchmark, "test", TEST_RECORDS))
    for train_set in train_sets:
        kinds = [benchmark for benchmark in benchmarks if benchmark.train_file == train_set.file] or list(benchmarks)
        records = [
            record for kind in kinds for record in _questions(kind, f"train {train_set.name}", TRAIN_RECORDS // len(kinds))
        ]
        _write(directory / train_set.file, records)


def _questions(benchmark: Benchmark, salt: str, count: int) -> list[Record]:
    rng = random.Random(f"{benchmark.name} {salt}")
    return [_question(benchmark, rng) for _ in range(count)]


def _question(benchmark: Benchmark, rng: random.Random) -> Record:
    a, b = rng.randrange(100), rng.randrange(100)
    if benchmark.rule is NUMBER:
        question, answer = f"Add {a} and {b}.", str(float(a + b))
        return Record(question, "", f"\nA: {a} + {b} = {a + b}. The answer is {a + b}.", answer)
    if benchmark.rule is LETTER:
        answer, *others = rng.sample("ABCDE", 5)
        sums = {answer: a + b} | {letter: a + b + number for number, letter in enumerate(others, start=1)}
        options = " ".join(f"({letter}) {sums[letter]}" for letter in sorted(sums))
        return Record(f"Add {a} and {b}. Answer Choices: {options}", "", f"\nA: The answer is ({answer}).", answer)
    assert isinstance(benchmark.rule, ChoiceRule)
    choices = benchmark.rule.choices
    answer = rng.choice(choices)
    question = f"Which one is number {choices.index(answer) + 1}? ({a}, {b})\n\nAnswer format: {'/'.join(choices)}"
    return Record(question, "", benchmark.response(answer), answer)


def _write(path: Path, records: Iterable[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([vars(record) for record in records], indent=1), encoding="utf-8")
