"""Heat maps, CSV files and a table of router loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lightning_modules.callbacks.monitoring.load_sums import LoadSums
from lightning_modules.callbacks.monitoring.logged import short_names
from lightning_modules.tables import markdown_table, write_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_NUMBERS = 30  # rows up to which every cell shows its number
MAX_LABELS = 64  # rows up to which every row has its name
MAX_TASK_LAYERS = 4  # layers in the map of tasks


def load_map(
    load: Tensor, rows: Sequence[str], even: float, title: str, dead: Tensor | None = None, group: int | None = None
) -> Figure:
    """Draw a heat map of loads (rows, E) in percent of the tokens: white is even, red is more, blue is less.

    Args:
        load: loads (rows, E).
        rows: names of the rows.
        even: an even load.
        title: the title.
        dead: cells to cross out (rows, E).
        group: number of rows between two lines.
    """
    from matplotlib.colors import TwoSlopeNorm  # here: it takes as long to import as a small run
    from matplotlib.figure import Figure

    percent = 100 * load.numpy()
    num_rows, num_experts = percent.shape
    # TensorBoard shows a figure 350 pixels wide: the narrower it is, the larger its letters
    figure = Figure(figsize=(2.4 + 0.3 * num_experts, min(max(0.22 * num_rows, 1) + 1.1, 20)), layout="constrained")
    axes = figure.add_subplot()
    top = min(max(200 * even, percent.max()), 100) if even < 1 else 200
    image = axes.imshow(percent, cmap="RdBu_r", norm=TwoSlopeNorm(100 * even, 0, top), aspect="auto", interpolation="nearest")
    figure.colorbar(image, label=f"% of tokens (even: {100 * even:.3g})", aspect=30, pad=0.02)
    axes.set_xticks(range(0, num_experts, -(-num_experts // MAX_NUMBERS)))
    axes.set_xlabel("expert")
    every = -(-num_rows // MAX_LABELS)
    axes.set_yticks(range(0, num_rows, every), labels=short_names(rows)[::every], fontsize=8)
    figure.suptitle(title, fontsize=10)
    if num_rows <= MAX_NUMBERS:
        for (row, expert), value in np.ndenumerate(percent):
            dark = value > 0.8 * top or value < 20 * even
            color = "white" if dark else "black"
            if dead is None or not dead[row, expert]:
                axes.text(expert, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=color)
    if dead is not None:
        y, x = dead.nonzero().T.numpy()
        axes.scatter(x, y, marker="x", s=60 if num_rows <= MAX_NUMBERS else 8, color="black", linewidth=1.5)
    for line in range(group or num_rows, num_rows, group or num_rows):
        axes.axhline(line - 0.5, color="black", linewidth=1.5)
    return figure


def task_map(sums: LoadSums, layers: Sequence[str], even: float, title: str) -> Figure:
    """Draw the loads of every task in the layers where tasks differ most."""
    widest = _widest_layers(sums)[:MAX_TASK_LAYERS]
    names = short_names(layers)
    load = torch.stack([task.load[layer] for layer in widest for task in sums.tasks.values()])
    rows = [f"{names[layer]}: {task}" for layer in widest for task in sums.tasks]
    return load_map(load, rows, even, f"layers where tasks differ most, {title}", group=len(sums.tasks))


def _widest_layers(sums: LoadSums) -> list[int]:
    """Return the layers in the order of the largest difference between two tasks' loads of an expert."""
    loads = torch.stack([task.load for task in sums.tasks.values()])
    spread = (loads.amax(0) - loads.amin(0)).amax(-1)
    return spread.argsort(descending=True, stable=True).tolist()


def write_layers(path: Path, layers: Sequence[str], sums: LoadSums) -> None:
    """Write a row per layer: its tokens, load imbalance and entropy, and every expert's load and mean gate."""
    statistics = sums.layers
    experts = range(statistics.num_experts)
    header = ["layer", "tokens", "load_imbalance", "load_entropy"]
    header += [f"load/expert_{e}" for e in experts] + [f"gate/expert_{e}" for e in experts]
    measures = (statistics.load_imbalance, statistics.load_entropy)
    rows = []
    for index, layer in enumerate(layers):
        values = [float(measure[index]) for measure in measures]
        values += statistics.load[index].tolist() + statistics.gate[index].tolist()
        rows.append([layer, round(float(statistics.tokens[index])), *values])
    write_table(path, header, rows, digits=6)


def write_tasks(path: Path, layers: Sequence[str], sums: LoadSums) -> None:
    """Write a row per task and layer, and one per task with the mean over the layers (layer `all`)."""
    rows = []
    for task, statistics in sums.tasks.items():
        tokens, loads = statistics.tokens, statistics.load
        mean = ("all", tokens.mean(), loads.mean(0))
        for layer, count, load in (mean, *zip(layers, tokens, loads, strict=True)):
            rows.append([task, layer, round(float(count)), *load.tolist()])
    header = ["task", "layer", "tokens", *(f"load/expert_{e}" for e in range(sums.layers.num_experts))]
    write_table(path, header, rows, digits=6)


def task_table(sums: LoadSums, layers: Sequence[str]) -> str:
    """Return task x expert: the percentage of a task's tokens that each expert serves, in the layer where tasks differ most."""
    layer = _widest_layers(sums)[0]
    rows = []
    for task, statistics in sums.tasks.items():
        percent = (f"{100 * value:.0f}" for value in statistics.load[layer].tolist())
        rows.append([task, f"{statistics.tokens[layer]:,.0f}", *percent])
    even = 100 * float(sums.layers.even_load[layer])
    title = (
        f"Percent of a task's tokens that each expert serves in {layers[layer]}, where tasks differ most (even: {even:.3g}); "
        "task_load.csv has every layer"
    )
    return f"{title}\n\n{markdown_table(['task', 'tokens', *map(str, range(sums.layers.num_experts))], rows)}"
