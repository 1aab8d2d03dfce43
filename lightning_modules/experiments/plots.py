"""The pictures of a comparison and of a sweep; whiskers are standard deviations over the seeds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_modules.experiments.report import scale_of
from lightning_modules.experiments.studies.study import Study

_MARKERS = "osD^v<>P"
_COLORS = colormaps["tab10"].colors  # type: ignore[attr-defined]


def plot_comparison(path: Path, frame: pd.DataFrame, labels: Mapping[str, str]) -> None:
    """Write a PNG: a marker per variant, the metric against trained parameters and against training time.

    The dotted line is the Pareto front: no variant on it is beaten at the same price. The legend, beside the plot so that no
    names overlap, lists the variants by their means; those on either front are bold.

    Args:
        path: the file.
        frame: see `result_frame`.
        labels: names in the legend, by variant.
    """
    figure, left, right = _panels((12, 4.8), sharey=True)
    runs = frame.assign(value=scale_of(frame)[0] * frame["last"]).groupby("variant")
    minimizes = frame.attrs["minimizes"]
    mean, std = (statistic[["value", "trained", "seconds"]] for statistic in (runs.mean(True), runs.std(numeric_only=True)))
    names = list(mean.sort_values("value", ascending=minimizes, kind="stable").index)
    fronts = set()
    panels = ((left, "trained", "trained parameters, with the head"), (right, "seconds", "seconds of training"))
    for axes, price, title in panels:
        for index, name in enumerate(names):
            style = {"marker": _MARKERS[index // len(_COLORS) + index % 2 * 4], "color": _COLORS[index % len(_COLORS)]}
            whiskers = std.fillna(0).loc[name]
            axes.errorbar(
                mean.loc[name, price], mean.loc[name, "value"], whiskers["value"], whiskers[price], label=labels[name],
                linestyle="none", capsize=2, alpha=0.8, **style,
            )  # fmt: skip
        merit = -mean["value"] if minimizes else mean["value"]
        front = mean.loc[pareto_front({name: (mean.loc[name, price], merit[name]) for name in names})]
        fronts.update(front.index)
        axes.plot(front[price], front["value"], ":", color="gray", zorder=0)
        axes.set_xlabel(title)
    left.set_xscale("log")
    right.set_xlim(left=0)
    left.set_ylabel(_metric(frame))
    legend = figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_fontweight("bold" if name in fronts else "normal")
    figure.savefig(path, dpi=120)


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names of the (price, value) points that no other point beats: as cheap and better, or cheaper and as good."""
    front: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not front or points[name][1] > points[front[-1]][1]:
            front.append(name)
    return front


def plot_study(path: Path, study: Study, frame: pd.DataFrame, own: str | None) -> None:
    """Write a PNG: small dots are seeds, large ones means.

    The right panel shows trained parameters if they differ, else the routers' load if there are any, else seconds.

    Values lie at equal distances, since they include 0 and span decades. Overlays have a row each. They are dots and no bars,
    since bars would have to begin at 0, where no difference can be seen.

    Args:
        path: the file.
        study: what was varied.
        frame: see `result_frame`, with the columns `value` and `series`.
        own: the variant that is the config as it is; it is ringed or black. None if there is none.
    """
    values = list(frame["value"].unique())
    if study.numeric:
        values.sort(key=float)
    figure, left, right = _panels((11, 4.2), width_ratios=(3, 2))
    if frame["trained"].nunique() > 1:
        title, column = "trained parameters", "trained"
    elif frame["load_imbalance"].notna().any():
        title, column = "load imbalance (1: even)", "load_imbalance"
    else:
        title, column = "seconds of training", "seconds"
    seeds = frame.assign(place=frame["value"].map(values.index), quantity=scale_of(frame)[0] * frame["last"])
    variants = seeds.drop_duplicates("variant").set_index("variant", drop=False)
    variants["quantity"] = frame.groupby("variant")[column].agg(lambda values: values.mean(skipna=False))
    for axes, label, runs in ((left, _metric(frame), seeds), (right, title, variants.dropna(subset="quantity"))):
        (_draw_lines if study.numeric else _draw_rows)(axes, runs.reset_index(drop=True), own)
        if study.numeric:
            axes.set(xlabel=study.axis, ylabel=label)
            axes.set_xticks(range(len(values)), values)
        else:
            axes.set_xlabel(label)
            axes.set_yticks(range(len(values)), values)
            axes.invert_yaxis()
    (right.set_ylim if study.numeric else right.set_xlim)(0)
    figure.suptitle(study.title)
    figure.savefig(path, dpi=120)


def _draw_lines(axes: Axes, runs: pd.DataFrame, own: str | None) -> None:
    for series, line in runs.groupby("series", sort=False):
        by_place = line.groupby("place")["quantity"]
        mean, std = by_place.mean(), by_place.std().fillna(0)
        color = axes.errorbar(mean.index, mean, std, marker="o", capsize=3, label=series).lines[0].get_color()
        axes.plot(line["place"], line["quantity"], ".", color=color, alpha=0.4)
        for place in line.loc[line["variant"] == own, "place"].unique():
            axes.plot(place, mean[place], "o", markersize=13, fillstyle="none", color="black")
    if len(axes.containers) > 1:
        axes.legend(title="layout")


def _draw_rows(axes: Axes, runs: pd.DataFrame, own: str | None) -> None:
    for name, row in runs.groupby("variant", sort=False):
        color = "black" if name == own else "tab:blue"
        mean, std = row["quantity"].mean(), row["quantity"].std() if len(row) > 1 else 0.0
        axes.errorbar(mean, row["place"].iat[0], xerr=std, marker="o", color=color, capsize=3)
        axes.plot(row["quantity"], row["place"], ".", color=color, alpha=0.4)
        if name == own:
            axes.axvline(mean, color="black", linestyle=":", linewidth=1)


def _panels(size: tuple[float, float], **options: Any) -> tuple[Figure, Axes, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, **options)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure, left, right


def _metric(frame: pd.DataFrame) -> str:
    unit = " [%]" if frame.attrs["is_share"] else ""
    return f"{frame['metric'].iat[0]}{unit}, seeds: {frame.groupby('variant').size().max()}"
