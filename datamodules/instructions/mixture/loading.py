"""From a source to checked examples."""

from __future__ import annotations

from collections.abc import Mapping

from datamodules.instructions.answers.rules import AnswerRule, rule_of
from datamodules.instructions.benchmarks import Benchmark
from datamodules.instructions.dataset import Example
from datamodules.instructions.mixture.mixing import Source
from datamodules.instructions.reading.records import Record, read_records
from datamodules.instructions.reading.source import Files
from fourier_moe.errors import UserError


def load_examples(
    source: Source, files: Files, *, is_train: bool, columns: Mapping[str, str] | None = None
) -> tuple[list[Example], int]:
    """Read a source; an id is `<source>/<position>`.

    Where the source says no benchmark, every answer's form decides how it is graded.

    Args:
        columns: what the fields of custom data are called, where they have other names.

    Returns:
        The examples, and the number of conversations left out because they have no response to learn.

    Raises:
        UserError: the file is missing or malformed, or a gold answer is not among those that its question offers.
    """
    file = source.file if source.custom else files.get(source.file)
    make = ExampleMaker(source, is_train)
    records = read_records(file, needs_answer=not source.custom, columns=columns if source.custom else None)
    examples = [make(number, record, f"'{file}' record {number + 1}") for number, record in enumerate(records) if record]
    return examples, len(records) - len(examples)


class ExampleMaker:
    """Makes examples of a source's records."""

    def __init__(self, source: Source, is_train: bool) -> None:
        self._source, self._task = source, source.name if is_train else None
        self._graders: dict[AnswerRule, Benchmark] = {}

    def __call__(self, number: int, record: Record, where: str) -> Example:
        """Return the example of the record at a position of its source.

        Raises:
            UserError: its gold answer is not among those that its question offers.
        """
        source, benchmark = self._source, self._source.benchmark
        if benchmark is None:
            rule = rule_of(record.answer)
            benchmark = self._graders.setdefault(rule, Benchmark(source.name, rule))
        if not source.is_mixture:
            _check_answer(record, benchmark, where)
        return Example(f"{source.name}/{number}", record, benchmark, self._task)


def _check_answer(record: Record, benchmark: Benchmark, where: str) -> None:
    choices = benchmark.choices(record.instruction)
    if choices and record.answer not in choices:
        raise UserError(f"{where}: the answer '{record.answer}' is not among the question's choices, {', '.join(choices)}")
    if not benchmark.rule.is_answer(record.answer):
        raise UserError(f"{where}: the answer '{record.answer}' is not {benchmark.rule.expected}, as in {benchmark.name}")
