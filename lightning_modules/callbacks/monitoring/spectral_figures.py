"""Figures of spectra: rings on the frequency plane, occupancy by radius, overlap between experts.

Shape legend: E experts, P positions per expert, R bins of the radius.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fourier_moe.analysis.spectra import ExpertSpectra
from lightning_modules.callbacks.monitoring.logged import short_names
from lightning_modules.callbacks.monitoring.model_spectra import NUM_BINS, ModelSpectra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = 3.9  # inches
EDGE = 1.04  # limit of the axes, beyond 1 so that dots on the border are complete
INK = 0.16  # share of a panel that dots cover if none overlap
MAX_NUMBERS = 16  # experts up to which every cell of the overlap shows its number


def rings(spectra: ModelSpectra, layers: Sequence[str], title: str) -> Figure:
    """Draw the frequency plane of some layers (the paper's Figures 5 and 6): a dot for every coefficient and its conjugate.

    The color is the expert, the area the energy (one scale within a panel); faint rings are the experts' bands.
    """
    from matplotlib.figure import Figure  # here: it takes as long to import as a small run

    colors = _colors(spectra)
    figure = Figure(figsize=(PANEL * len(layers) + 1.5, PANEL + 0.9), layout="compressed")
    panels = figure.subplots(1, len(layers), squeeze=False, sharey=True)[0]
    names = dict(zip(spectra.layers, short_names(list(spectra.layers)), strict=True))
    for axes, layer in zip(panels, layers, strict=True):
        _draw_bands(axes, spectra, colors)
        _draw_coefficients(axes, spectra.layers[layer], colors)
        axes.set(xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), aspect="equal", title=names[layer], xlabel="input frequency 2v/N")
        axes.set_xticks([-1, -0.5, 0, 0.5, 1])
        axes.set_yticks([-1, -0.5, 0, 0.5, 1])
    panels[0].set_ylabel("output frequency 2u/M")
    _expert_bar(figure, panels, colors, spectra.short_names)
    figure.suptitle(f"spectral coefficients, {title}")
    return figure


def radial_occupancy(spectra: ModelSpectra, title: str) -> Figure:
    """Draw the density of energy over the radius by expert, all layers together; dotted: if all coefficients were equal."""
    from matplotlib.figure import Figure

    colors = _colors(spectra)
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.add_subplot()
    edges = np.linspace(0, 1, NUM_BINS + 1)
    total = float(spectra.occupancy.sum()) or 1.0
    for expert, color in enumerate(colors):
        energy, positions = (_curve(values[expert]) for values in (spectra.occupancy / total, spectra.positions))
        axes.stairs(energy, edges, fill=True, color=color, alpha=0.3)
        axes.stairs(energy, edges, color=color, linewidth=1.5)
        axes.stairs(positions, edges, color=color, linewidth=1, linestyle=":")
    axes.set(xlim=(0, 1), xlabel="normalized radius (0: constant, 1: corner)", ylabel="energy per unit of radius")
    axes.set_ylim(bottom=0)
    axes.set_title(f"radial occupancy, {title}", loc="left", fontsize=9)
    axes.plot([], [], color="black", linewidth=1.5, label="energy")
    axes.plot([], [], color="black", linewidth=1, linestyle=":", label="positions")
    axes.legend(
        frameon=False,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0.1,
        ncols=2,
        fontsize=7,
        columnspacing=1,
        handlelength=1,
    )
    _expert_bar(figure, axes, colors, spectra.short_names)
    return figure


def overlap(spectra: ModelSpectra, title: str) -> Figure:
    """Draw the overlap between experts, all layers together: share of energy at the same radii, cosine between updates."""
    from matplotlib.figure import Figure

    side = 1.2 + 0.3 * min(len(spectra.names), 20)
    figure = Figure(figsize=(side + 1, 2 * side + 0.5), layout="constrained")
    upper, lower = figure.subplots(2, 1)
    _draw_matrix(upper, spectra.radial_overlap, "energy at the same radii", cmap="Blues", vmin=0)
    _draw_matrix(lower, spectra.update_overlap, "cosine between updates", cmap="RdBu_r", vmin=-1)
    figure.suptitle(f"overlap between experts, {title}", fontsize=10)
    return figure


def _curve(share_R: torch.Tensor) -> np.ndarray:
    """Return the density of shares (R,), NaN where it is 0, so that nothing is drawn."""
    return (share_R * NUM_BINS).where(share_R > 0, math.nan).numpy()


def _draw_matrix(axes: Axes, values: torch.Tensor, title: str, **options: Any) -> None:
    image = axes.imshow(values.numpy(), vmax=1, interpolation="nearest", **options)
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
    axes.set(title=title, xlabel="expert", ylabel="expert")
    every = -(-len(values) // MAX_NUMBERS)
    axes.set_xticks(range(0, len(values), every))
    axes.set_yticks(range(0, len(values), every))
    if len(values) > MAX_NUMBERS:
        return
    for (row, column), value in np.ndenumerate(values.numpy()):
        color = "white" if abs(value) > 0.6 else "black"
        number = f"{round(value, 2) + 0.0:.2f}".replace("0.", ".", 1)  # + 0: no -0.00
        axes.text(column, row, number, ha="center", va="center", fontsize=7, color=color)


def _draw_bands(axes: Axes, spectra: ModelSpectra, colors: np.ndarray) -> None:
    from matplotlib.patches import Annulus

    bands = spectra.bands
    if not bands:
        return
    depth = max(1.0, sum(min(outer, 1) - inner for inner, outer in bands if inner < 1))  # mean number of bands that overlap
    for (inner, outer), color in zip(bands, colors, strict=False):
        width = math.sqrt(2) * (outer - inner)
        axes.add_patch(Annulus((0, 0), math.sqrt(2) * outer, width, facecolor=color, alpha=0.12 / depth, linewidth=0))


def _draw_coefficients(axes: Axes, spectra: ExpertSpectra, colors: np.ndarray) -> None:
    """Draw the largest dots first, so that none hides another."""
    y, x = (2 * spectra.frequencies / torch.tensor([spectra.out_features, spectra.in_features]))[spectra.owned].T.numpy()
    expert = spectra.owned.nonzero()[:, 0].numpy()
    energy = spectra.pair_energy[spectra.owned].numpy()
    points = INK * (72 * PANEL) ** 2 / 2 * energy / (energy.sum() or 1.0)  # a pair is two dots
    area = np.clip(points, 0.3, 150)
    both = np.repeat(np.argsort(-energy), 2)
    sign = np.tile([1, -1], len(energy))
    edge = np.where(area > 6, 0.3, 0)  # white edges would hide smaller dots
    color = colors[expert[both]]
    axes.scatter(sign * x[both], sign * y[both], s=area[both], c=color, linewidth=edge[both], edgecolor="white")


def _expert_bar(figure: Figure, panels: Any, colors: np.ndarray, labels: Sequence[str]) -> None:
    """Draw the color bar of experts."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    num_experts = len(colors)
    norm = BoundaryNorm(np.arange(num_experts + 1) - 0.5, num_experts)
    bar = figure.colorbar(ScalarMappable(norm, ListedColormap(colors)), ax=panels, label="expert", shrink=0.85, pad=0.01)
    every = -(-num_experts // MAX_NUMBERS)
    bar.set_ticks(range(0, num_experts, every), labels=labels[::every])
    bar.minorticks_off()


def _colors(spectra: ModelSpectra) -> np.ndarray:
    """Return a color per expert (E, 4), from low to high frequencies as in the rainbow; gray for the shared one."""
    from matplotlib import colormaps

    num_routed = spectra.config.num_experts
    colors = colormaps["turbo"](np.linspace(0.06, 0.94, num_routed))
    return np.concatenate([colors, np.full((len(spectra.names) - num_routed, 4), [0.45, 0.45, 0.45, 1.0])])
