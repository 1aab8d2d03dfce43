"""What the scripts that make data share: a random draw, its files, and a number of examples on the command line."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

_Item = TypeVar("_Item")


def draw(name: str, items: Sequence[_Item], train: int, test: int) -> tuple[list[_Item], list[_Item]]:
    """Draw training and test items at random, always the same; end the script if there are too few."""
    if train + test > len(items):
        raise SystemExit(f"--train {train} --test {test}: {name} has {len(items)} questions")
    shuffled = list(items)
    random.Random(0).shuffle(shuffled)
    return shuffled[:train], shuffled[train : train + test]


def write_lines(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def count(text: str) -> int:
    """Parse a number of examples, for `argparse`."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be 1 or more")
    return number
