"""A picture per scaling study: times on the left, the product's time over the frozen projection's on the right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

_TIMES = (("frozen", "frozen projection"), ("product", "routed spectral product"), ("adapted", "adapted projection"))


def plot_study(title: str, axis: str, rows: Sequence[dict[str, Any]], path: Path, *, clock: str = "wall") -> None:
    """Write a PNG; lines are medians, bands lie between the quartiles."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    times, ratio = figure.subplots(1, 2)
    for part, label in _TIMES:
        _band(times, axis, rows, part, label, 1e3)
    times.set(ylabel=f"forward + backward [ms of {clock} time]", yscale="log")
    times.legend()
    _band(ratio, axis, rows, "product_to_frozen", "", 1.0)
    ratio.set(ylabel="product / frozen projection")
    ratio.set_ylim(bottom=0)
    for plot in (times, ratio):
        plot.set_xscale("log", base=2)
        values = [row[axis] for row in rows]
        plot.set_xticks(values, [f"{value:,}" for value in values])
        plot.xaxis.set_minor_locator(NullLocator())
        plot.set_xlabel(axis.replace("num_", "").replace("top_k", "active experts"))
        plot.grid(alpha=0.3)
    figure.suptitle(title[0].upper() + title[1:])
    figure.savefig(path, dpi=120)


def _band(plot: Axes, axis: str, rows: Sequence[dict[str, Any]], quantity: str, label: str, factor: float) -> None:
    x = [row[axis] for row in rows]
    lower, median, upper = (
        [factor * row[quantity][statistic] for row in rows] for statistic in ("lower_quartile", "median", "upper_quartile")
    )
    (line,) = plot.plot(x, median, marker="o", label=label)
    plot.fill_between(x, lower, upper, color=line.get_color(), alpha=0.2)
