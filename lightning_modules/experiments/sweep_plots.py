"""The picture of a sweep: lines with their spread over the seeds, and a row each for ablations."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_modules.experiments.studies import Ablations, Study
from lightning_modules.experiments.sweep_report import Row


def plot_study(path: Path, study: Study, rows: Sequence[Row], own: str | None) -> None:
    """Write a PNG: small dots are seeds, large ones means, whiskers standard deviations; the config's own is ringed or black.

    Beside it: trained parameters where they differ, else the load imbalance.
    """
    values = list(dict.fromkeys(row.setting.label for row in rows))
    if not isinstance(study, Ablations):
        values.sort(key=float)
    varies = len({row.trained for row in rows}) > 1
    beside = "trained parameters" if varies else "load imbalance (1: even)"
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    if isinstance(study, Ablations):
        draw, place = _dots, (left.set_yticks, right.set_yticks)
    else:
        draw, place = _lines, (left.set_xticks, right.set_xticks)
    draw(left, rows, values, lambda row: row.percents, own)
    draw(right, rows, values, lambda row: [row.trained] if varies else _known(row.load("load imbalance")), own)
    for set_ticks in place:
        set_ticks(range(len(values)), values)
    metric = f"{rows[0].results[0].main_metric} [%], seeds: {max(len(row.results) for row in rows)}"
    for axes, quantity in ((left, metric), (right, beside)):
        if isinstance(study, Ablations):
            axes.set_xlabel(quantity)
            axes.invert_yaxis()
        else:
            axes.set(xlabel=study.axis, ylabel=quantity)
        axes.grid(alpha=0.3)
    if isinstance(study, Ablations):
        right.set_xlim(left=0)
    else:
        right.set_ylim(bottom=0)
    figure.suptitle(study.title)
    figure.savefig(path, dpi=120)


def _known(value: float | None) -> list[float]:
    return [] if value is None else [value]


Quantity = Callable[[Row], list[float]]


def _lines(axes: Axes, rows: Sequence[Row], values: list[str], quantity: Quantity, own: str | None) -> None:
    """Values at equal distances in the order of their size: they include 0 and span decades."""
    for series in dict.fromkeys(row.setting.series for row in rows):
        measured = [(values.index(row.setting.label), row, quantity(row)) for row in rows if row.setting.series == series]
        measured = sorted((entry for entry in measured if entry[2]), key=lambda entry: entry[0])
        if not measured:
            continue
        places, means = [place for place, *_ in measured], [statistics.mean(numbers) for *_, numbers in measured]
        line = axes.errorbar(places, means, [_spread(numbers) for *_, numbers in measured], marker="o", capsize=3, label=series)
        color = line.lines[0].get_color()
        for place, row, numbers in measured:
            axes.plot([place] * len(numbers), numbers, ".", color=color, alpha=0.4)
            if row.setting.name == own:
                axes.plot(place, statistics.mean(numbers), "o", markersize=13, fillstyle="none", color="black")
    if len(axes.containers) > 1:
        axes.legend(title="layout")


def _dots(axes: Axes, rows: Sequence[Row], values: list[str], quantity: Quantity, own: str | None) -> None:
    """A setting per row of the plot. Dots, since bars would have to begin at 0, where no difference is to be seen."""
    for row in rows:
        numbers = quantity(row)
        if not numbers:
            continue
        place, mean = values.index(row.setting.label), statistics.mean(numbers)
        color = "black" if row.setting.name == own else "tab:blue"
        axes.errorbar(mean, place, xerr=_spread(numbers), marker="o", color=color, capsize=3)
        axes.plot(numbers, [place] * len(numbers), ".", color=color, alpha=0.4)
        if row.setting.name == own:
            axes.axvline(mean, color="black", linestyle=":", linewidth=1)


def _spread(numbers: list[float]) -> float:
    return statistics.stdev(numbers) if len(numbers) > 1 else 0.0
