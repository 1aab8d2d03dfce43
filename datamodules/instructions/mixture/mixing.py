"""Training sources: which sets, how often each of their examples comes, and what is held out."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from datamodules.instructions.benchmarks import Benchmark, TrainSet
from datamodules.instructions.dataset import Example
from datamodules.instructions.reading.rows import HUB, SUFFIXES, HubSplit
from datamodules.shared.custom import CUSTOM, data_files, expected_files, files_of_split
from datamodules.shared.splits import TEST, TRAIN, VALIDATION
from fourier_moe.errors import UserError, printable

HELD_OUT = "held_out"  # name of the evaluation set that is taken out of the training examples


@dataclass(frozen=True)
class Source:
    """One set of records.

    Attributes:
        name: what batches, logs and reports call it.
        file: in LLM-Adapters' layout, or of the user's own: a path, or a split of the hub.
        custom: whether it is the user's own.
        count: official number of records, None if not known.
        benchmark: how its answers are graded; None decides by the form of each answer.
        weight: how often each of its examples comes in an epoch, on average.
    """

    name: str
    file: str
    custom: bool = False
    count: int | None = None
    benchmark: Benchmark | None = None
    weight: float = 1.0

    @property
    def is_mixture(self) -> bool:
        """Whether it is one of LLM-Adapters' mixed training files: pinned, too large to reject over one odd record."""
        return not self.custom and self.file.startswith("ft-training_set/")


def train_sources(
    train: Mapping[str, float] | Sequence[str] | str, train_sets: Sequence[TrainSet], directory: Path | None = None
) -> list[Source]:
    """Return the sources that `train` names.

    Args:
        train: names of `train_sets`, `custom`, paths of files or `hub:owner/name`: one, a list, or each with its weight.
        train_sets: the rows of the table.
        directory: where the files of `custom` are.

    Raises:
        UserError: a name is unknown or comes twice, a file does not exist, or a weight is not positive.
    """
    names = [train] if isinstance(train, str) else list(train)
    weights = dict(train) if isinstance(train, Mapping) else dict.fromkeys(names, 1.0)
    known = {row.name: row for row in train_sets}
    if not names:
        raise UserError(f"train is empty; {choices(known)}")
    sources = []
    for name in names:
        weight = weights[name]
        if not (isinstance(weight, int | float) and weight > 0 and math.isfinite(weight)):
            raise UserError(f"train: the weight of '{name}' must be a positive number, got {weight!r}")
        if name in known:
            sources.append(Source(name, known[name].file, count=known[name].count, weight=weight))
        elif name == CUSTOM:
            sources.append(_in_directory("train", TRAIN, directory, weight))
        elif name.startswith(HUB):
            sources.append(_on_hub("train", name, TRAIN, weight))
        elif _is_path(name):
            sources.append(_custom("train", name, weight))
        else:
            raise UserError(f"train: '{name}' is unknown; {choices(known)}")
    return _told_apart("train", sources)


def evaluation_sources(
    argument: str, names: Sequence[str], benchmarks: Mapping[str, Benchmark], directory: Path | None = None
) -> list[Source]:
    """Return the sources of `test` or `validation_sets`: benchmarks, `custom` (a file of `directory`), paths of files, or
    `hub:owner/name`.

    Raises:
        UserError: a name is unknown, comes twice or is taken, or a file does not exist.
    """
    split = TEST if argument == "test" else VALIDATION
    sources = []
    for name in names:
        if name in benchmarks:
            row = benchmarks[name]
            sources.append(Source(name, row.test_file, count=row.count, benchmark=row))
        elif name == CUSTOM:
            sources.append(_in_directory(argument, split, directory))
        elif name.startswith(HUB):
            sources.append(_on_hub(argument, name, split))
        elif _is_path(name):
            sources.append(_custom(argument, name))
        else:
            raise UserError(f"{argument}: '{name}' is unknown; {choices(benchmarks)}")
    sources = _told_apart(argument, sources)
    if argument == "validation_sets" and HELD_OUT in {source.name for source in sources}:
        raise UserError(f"validation_sets: '{HELD_OUT}' is what the examples held out of train are called; rename the file")
    return sources


def custom_tests(directory: Path | None) -> list[str]:
    """Return `custom` if the directory has a test file, else nothing."""
    found = files_of_split(data_files(directory, SUFFIXES), TEST) if directory is not None else []
    return [CUSTOM] if found else []


def hold_out(examples: Sequence[Example], size: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Divide training examples at random into those to train on and `size` held out for validation, both in file order.

    Raises:
        UserError: nothing would be left to train on.
    """
    if size >= len(examples):
        raise UserError(f"validation_size={size} would hold out all {len(examples)} training examples; give a smaller number")
    held_out = set(random.Random(seed).sample(range(len(examples)), size))
    kept = [example for index, example in enumerate(examples) if index not in held_out]
    return kept, [examples[index] for index in sorted(held_out)]


def _is_path(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) or "/" in name or Path(name).expanduser().exists()


def choices(known: Iterable[str]) -> str:
    """Return what may be given instead, as the end of an error."""
    names = ", ".join(known)
    own = f"{CUSTOM} (a file of directory), the path of a JSON or parquet file, or {HUB}owner/name"
    return f"choose from {names}, or give {own}" if names else f"give {own}"


def _in_directory(argument: str, split: str, directory: Path | None, weight: float = 1.0) -> Source:
    """Return the file of a split in a directory of custom data."""
    expected = expected_files(split, SUFFIXES)
    if directory is None:
        raise UserError(f"{argument}: '{CUSTOM}' needs directory, a folder with {expected}")
    files = data_files(directory, SUFFIXES)
    found = files_of_split(files, split)
    if len(found) != 1:
        there = ", ".join(path.name for path in found or files) or "no such file"
        raise UserError(f"{argument}: '{CUSTOM}' needs one {expected} in directory '{directory}'; there is {there}")
    return Source(CUSTOM, str(found[0]), custom=True, weight=weight)


def _custom(argument: str, name: str, weight: float = 1.0) -> Source:
    path = Path(name).expanduser()
    if path.is_dir():
        raise UserError(f"{argument}: '{name}' is a directory; give the path of a JSON or parquet file in it")
    if not path.is_file():
        raise UserError(f"{argument}: there is no file '{name}'")
    return Source(printable(path.stem), str(path), custom=True, weight=weight)


def _on_hub(argument: str, name: str, split: str, weight: float = 1.0) -> Source:
    try:
        found = HubSplit.parse(name)
    except UserError as error:
        raise UserError(f"{argument}: {error}") from error
    found = found._replace(split=found.split or split)
    return Source(printable(found.name), str(found), custom=True, weight=weight)


def _told_apart(argument: str, sources: Sequence[Source]) -> list[Source]:
    """Return sources with names of their own: those of the hub, where they need it, with owner, revision and split."""
    names = [source.name for source in sources]
    sources = [
        replace(source, name=printable(re.sub("[/:@]", "-", source.file.removeprefix(HUB))))
        if source.file.startswith(HUB) and names.count(source.name) > 1
        else source
        for source in sources
    ]
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{argument}: '{twice[0]}' is there more than once; every set needs a name of its own")
    return sources
