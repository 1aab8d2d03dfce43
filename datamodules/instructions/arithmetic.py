"""Generated one-step arithmetic in the records of the mathematics sets, for a demo without downloads."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from datamodules.instructions import Benchmark, InstructionDataModule, TrainSet
from datamodules.instructions.answers.rules import NUMBER
from datamodules.instructions.reading.records import Record

LARGEST = 12  # of the numbers that are added, compared, ...
NAMES = ("Tom", "Mia", "Leo", "Ana", "Sam", "Eva", "Ben", "Zoe")
THINGS = ("apples", "pears", "cups", "pens", "books", "stars", "coins", "birds", "cards", "eggs")

TRAIN_EXAMPLES, TEST_EXAMPLES = 600, 80  # of each task
TEST_SHARE = 0.2  # of a task's pairs of numbers, never trained on


@dataclass(frozen=True)
class ArithmeticTask:
    """A kind of question about two numbers a and b.

    Attributes:
        name: of the set, as it appears in configs and reports.
        ways: the wordings; `{one}` and `{other}` are names, `{things}` what is counted.
        values: what wordings say beside a and b, and the answer under `answer`.
    """

    name: str
    ways: tuple[str, ...]
    values: Callable[[int, int], dict[str, object]]

    def record(self, pair: tuple[int, int], way: str, rng: random.Random) -> Record:
        """Return a question about `pair` in the words of `way`."""
        a, b = pair
        values = self.values(a, b)
        one, other = rng.sample(NAMES, 2)
        question = way.format(a=a, b=b, one=one, other=other, things=rng.choice(THINGS), **values)
        answer = str(values["answer"])
        return Record(instruction=question, input="", output=f"The answer is {answer}", answer=answer)


TASKS = (
    ArithmeticTask(
        "addition",
        (
            "{one} has {a} {things} and buys {b} more. How many {things} are there now?",
            "{one} finds {a} {things}, {other} finds {b}. How many do they have together?",
            "There are {a} {things} in a box. {one} adds {b}. How many are in the box?",
        ),
        lambda a, b: {"answer": a + b},
    ),
    ArithmeticTask(
        "subtraction",
        (
            "{one} has {sum} {things} and loses {b}. How many {things} are left?",
            "{one} had {sum} {things} and gave {b} to {other}. How many did {one} keep?",
            "Of {sum} {things} {one} sells {b}. How many remain?",
        ),
        lambda a, b: {"sum": a + b, "answer": a},
    ),
    ArithmeticTask(
        "comparison",
        (
            "{one} has {a} {things}, {other} has {b}. How many has the one with most?",
            "Which number is larger, {a} or {b}?",
            "{one} may take {a} or {b} {things} and wants the larger number. How many is that?",
        ),
        lambda a, b: {"answer": max(a, b)},
    ),
    ArithmeticTask(
        "doubling",
        (
            "{one}, {b} years old, has {a} {things}. {other} has twice as many. How many?",
            "On day {b} {one} gets {a} {things}, and as many again the next day. How many in all?",
            "{b} {things} lie around, two boxes hold {a} each. How many are in the boxes?",
        ),
        lambda a, b: {"answer": 2 * a},
    ),
    ArithmeticTask(
        "recall",
        (
            "{one} has {a} {things}, {other} has {b}. How many has {other}?",
            "{one} is {a} years old and owns {b} {things}. How many does {one} own?",
            "Room {a} is full of {things}: {b} of them. How many are in it?",
        ),
        lambda a, b: {"answer": b},
    ),
)


class ArithmeticDataModule(InstructionDataModule):
    """Short questions whose answers are whole numbers up to 24, one set per kind: addition, subtraction, comparison, ...

    The files are generated, in the mathematics sets' form, and removed afterwards. No pair of numbers of a test question comes
    in the same kind's training questions.

    Args:
        train: kinds to train on, or paths of files of your own; one, a list, or each with its weight (how often each example
            comes in an epoch). Null is all of them.
        test: kinds to test on, or paths. Null is all of them.
        prompt: plain, a short one; llm_adapters, the published figures' prompts; or chat, the tokenizer's chat template.
        max_length: of prompt and response in training, in tokens.
        directory: read these files, in LLM-Adapters' layout, instead of generating any.
        synthetic: generate the files, which is what happens without `directory` in any case.
        arguments: see InstructionDataModule.
    """

    benchmarks: ClassVar[Mapping[str, Benchmark]] = {
        task.name: Benchmark(task.name, NUMBER, count=TEST_EXAMPLES) for task in TASKS
    }
    train_sets: ClassVar[Sequence[TrainSet]] = [
        TrainSet(task.name, f"ft-training_set/{task.name}.json", TRAIN_EXAMPLES) for task in TASKS
    ]

    def __init__(
        self,
        train: dict[str, float] | list[str] | str | None = None,
        test: list[str] | None = None,
        prompt: Literal["llm_adapters", "plain", "chat"] = "plain",
        max_length: int = 512,
        directory: str | None = None,
        synthetic: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(
            train=[task.name for task in TASKS] if train is None else train,
            test=[task.name for task in TASKS] if test is None else test,
            prompt=prompt,
            max_length=max_length,
            directory=directory,
            synthetic=synthetic or directory is None,
            **arguments,
        )

    def write_synthetic(self, directory: Path) -> None:
        """Write the files of all kinds, the same ones every time."""
        write_arithmetic(directory)


def write_arithmetic(directory: Path, seed: int = 1) -> None:
    """Write `ft-training_set/<task>.json` and `dataset/<task>/test.json` for every task.

    No pair of numbers of a test question comes in the same task's training questions.
    """
    for task in TASKS:
        rng = random.Random(f"{seed} {task.name}")
        pairs = [(a, b) for a in range(1, LARGEST + 1) for b in range(1, LARGEST + 1)]
        rng.shuffle(pairs)
        held_out = round(TEST_SHARE * len(pairs))
        test, train = pairs[:held_out], pairs[held_out:]
        _write(directory / "dataset" / task.name / "test.json", _records(task, test, TEST_EXAMPLES, rng))
        _write(directory / "ft-training_set" / f"{task.name}.json", _records(task, train, TRAIN_EXAMPLES, rng))


def _records(task: ArithmeticTask, pairs: list[tuple[int, int]], count: int, rng: random.Random) -> list[Record]:
    """Return every pair in one wording, every pair in the next, ... until there are enough."""
    rounds = itertools.cycle(task.ways)
    asked = ((pair, way) for way in rounds for pair in pairs)
    return [task.record(pair, way, rng) for pair, way in itertools.islice(asked, count)]


def _write(path: Path, records: list[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([vars(record) for record in records], indent=1), encoding="utf-8")
