"""A study of one argument of `fit`, with any method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fourier_moe.errors import UserError
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
        """Return a setting for each value.

        Raises:
            UserError: if two values would have the same directory.
        """
        option = self.axis.rpartition(".")[2]
        settings = [Setting(f"{option}_{Path(value).name}", value, [f"--{self.axis}", value]) for value in self.values]
        if len({setting.name for setting in settings}) < len(settings):
            raise UserError(f"--values {','.join(self.values)}: values must differ, results go to directories of these names")
        return settings


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
