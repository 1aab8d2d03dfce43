"""What every study has: its settings, and the table of what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from lightning_modules.experiments.report import format_table
from lightning_modules.experiments.results import Result, result_frame


@dataclass(frozen=True)
class Setting:
    """One setting of a study.

    Attributes:
        name: directory of its runs, and name of the variant.
        label: text in tables and plots.
        words: the change, as arguments of `fit`.
        series: its line in the plot; "" if the study has one line.
    """

    name: str
    label: str
    words: Sequence[str] = ()
    series: str = ""


@dataclass(frozen=True)
class Study:
    """What is varied.

    Attributes:
        title: heading of table and plot.
        axis: what the values are.
    """

    title: str
    axis: str

    @property
    def numeric(self) -> bool:
        """Whether all values are numbers."""
        raise NotImplementedError


def study_frame(study: str, settings: Sequence[Setting], results: Sequence[Result], metric: str | None = None) -> pd.DataFrame:
    """Return `result_frame` with the study, and the series and value of every run's setting, in front."""
    frame, by_name = result_frame(results, metric), {setting.name: setting for setting in settings}
    frame.insert(0, "study", study)
    frame.insert(1, "series", [by_name[name].series for name in frame["variant"]])
    frame.insert(2, "value", [by_name[name].label for name in frame["variant"]])
    return frame


def study_table(study: Study, settings: Sequence[Setting], frame: pd.DataFrame, own: str | None) -> str:
    """Return a Markdown table with a row per setting that has runs, see `format_table`; a study of layouts names them."""
    layouts = any(setting.series for setting in settings)
    labels = {one.name: {study.axis: one.label, **({"layout": one.series} if layouts else {})} for one in settings}
    loads = ("load imbalance", "dead experts") if frame["load_imbalance"].notna().any() else ()
    kinds = [kind for kind in ("experts", "adapter") if kind in frame and frame[kind].any()]
    return format_table(frame, labels, kinds, (*loads, "seconds"), own)
