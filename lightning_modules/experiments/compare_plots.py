"""The picture of a comparison: a test metric against trained parameters and against training time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_modules.experiments.grid import Result

_MARKERS = "osD^v<>P"
_COLOURS = colormaps["tab10"].colors  # type: ignore[attr-defined]


def plot_methods(path: Path, results: Sequence[Result], labels: Mapping[str, str], metric: str) -> None:
    """Write a PNG: a marker per method at its mean over the seeds, whiskers of one standard deviation.

    The dotted line is the Pareto front: no method is better at the same price. Names are in a legend, in the order of their
    means, those on either front in bold: beside the points they would lie on each other.
    """
    runs = {name: [result for result in results if result.overlay == name] for name in labels}
    heights = {name: _percents(own, metric) for name, own in runs.items()}
    names = sorted(labels, key=lambda name: -statistics.mean(heights[name]))
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    panels = (
        (left, "trained parameters, with the head", {name: [float(sum(runs[name][0].parameters.values()))] for name in names}),
        (right, "seconds of training", {name: [result.seconds for result in runs[name]] for name in names}),
    )
    fronts = set()
    for axes, quantity, prices in panels:
        for index, name in enumerate(names):
            _draw(axes, prices[name], heights[name], labels[name], index)
        front = pareto_front({name: (statistics.mean(prices[name]), statistics.mean(heights[name])) for name in names})
        fronts.update(front)
        points = [(statistics.mean(prices[name]), statistics.mean(heights[name])) for name in front]
        axes.plot(*zip(*points, strict=True), ":", color="grey", zorder=0)
        axes.set_xlabel(quantity)
        axes.grid(alpha=0.3)
    left.set_xscale("log")
    right.set_xlim(left=0)
    seeds = max(len(own) for own in runs.values())
    left.set_ylabel(f"{metric} [%], seeds: {seeds}")
    legend = figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_fontweight("bold" if name in fronts else "normal")
    figure.savefig(path, dpi=120)


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the (price, value) points of which no other is as cheap and better, or cheaper and as good; by price."""
    front: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not front or points[name][1] > points[front[-1]][1]:
            front.append(name)
    return front


def _draw(axes: Axes, prices: list[float], heights: list[float], label: str, index: int) -> None:
    price, height = statistics.mean(prices), statistics.mean(heights)
    spread_x, spread_y = (statistics.stdev(values) if len(values) > 1 else 0.0 for values in (prices, heights))
    style = {"marker": _MARKERS[index // len(_COLOURS) + index % 2 * 4], "color": _COLOURS[index % len(_COLOURS)]}
    axes.errorbar(price, height, spread_y, spread_x, linestyle="none", capsize=2, alpha=0.8, label=label, **style)


def _percents(results: Sequence[Result], metric: str) -> list[float]:
    return [100 * result.metrics[metric] for result in results]
