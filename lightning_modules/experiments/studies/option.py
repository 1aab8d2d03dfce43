"""A study of one argument of `fit`, with any method."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_modules.experiments.studies.study import Setting, Study


@dataclass(frozen=True)
class OptionStudy(Study):
    """A study of one argument of `fit`, such as `model.optimization.adapter.lr`, which is its axis.

    Attributes:
        values: as on the command line.
    """

    values: Sequence[str]

    @property
    def numeric(self) -> bool:
        return all(_is_number(value) for value in self.values)

    @property
    def settings(self) -> list[Setting]:
        """Return a setting for each value; their directories are called `adapter.lr_1e-3`."""
        option = ".".join([part for part in self.axis.split(".") if part != "init_args"][-2:])
        return [Setting(f"{option}_{_file_name(value)}", value, [f"--{self.axis}={value}"]) for value in self.values]


def split_values(values: str | float | Sequence[Any]) -> list[str]:
    """Return the values of `--values`, separated by commas outside of brackets, or those of a list in a config file."""
    if isinstance(values, str):
        return [value.strip() for value in re.split(r",(?![^\[{]*[\]}])", values)]  # no bracket is closed before one is opened
    listed = values if isinstance(values, Sequence) else [values]
    return [value if isinstance(value, str) else json.dumps(value) for value in listed]


def _file_name(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", value.strip("[]{}'\" "))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
