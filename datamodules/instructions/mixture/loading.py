"""From a source to checked examples."""

from __future__ import annotations

from pathlib import Path

from datamodules.instructions.answers.rules import AnswerRule, rule_of
from datamodules.instructions.benchmarks import Benchmark
from datamodules.instructions.dataset import Example
from datamodules.instructions.mixture.mixing import Source
from datamodules.instructions.records import Record, read_records
from datamodules.instructions.source import Files
from fourier_moe.errors import UserError


def load_examples(source: Source, files: Files, *, is_train: bool) -> list[Example]:
    """Read a source; an id is `<source>/<position>`.

    Where the source says no benchmark, every answer's form decides how it is graded.

    Raises:
        UserError: the file is missing or malformed, or a gold answer is not among those that its question offers.
    """
    path = Path(source.file) if source.custom else files.get(source.file)
    graders: dict[AnswerRule, Benchmark] = {}
    examples = []
    for number, record in enumerate(read_records(path, needs_answer=not source.custom)):
        if source.benchmark is not None:
            benchmark = source.benchmark
        else:
            rule = rule_of(record.answer)
            benchmark = graders.setdefault(rule, Benchmark(source.name, rule))
        if not source.is_mixture:
            _check_answer(record, benchmark, f"'{path}' record {number + 1}")
        examples.append(Example(f"{source.name}/{number}", record, benchmark, source.name if is_train else None))
    return examples


def _check_answer(record: Record, benchmark: Benchmark, where: str) -> None:
    choices = benchmark.choices(record.instruction)
    if choices and record.answer not in choices:
        raise UserError(f"{where}: the answer '{record.answer}' is not among the question's choices, {', '.join(choices)}")
    if not benchmark.rule.is_answer(record.answer):
        raise UserError(f"{where}: the answer '{record.answer}' is not {benchmark.rule.expected}, as in {benchmark.name}")
